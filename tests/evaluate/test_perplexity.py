"""Bits per byte against closed forms, against transformers' loss, and across tokenizers."""

import json
import math

import pytest
import torch
from tests.models.oracle import make_oracle, redraw, save_theirs

from hanlin.core.errors import HanlinError
from hanlin.core.text_sources import Document
from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.data.build import build_shards
from hanlin.data.text_batches import ShardedText
from hanlin.evaluate.perplexity import HeldOut, evaluate_files, evaluate_strings, evaluate_text
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer, load_model
from hanlin.tokens import Tokenizer

TEXTS = [
    "The tokenizer cuts text into pieces; the model predicts the pieces one by one. " * 4,
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 3,
    "def add(a, b):\n    return a + b  # 1234567890\n",
]


@pytest.fixture(scope="module")
def fine() -> Tokenizer:
    """Nearly one byte a token."""
    return Tokenizer.train_from_iterator(TEXTS, vocab_size=270)


@pytest.fixture(scope="module")
def coarse() -> Tokenizer:
    return Tokenizer.train_from_iterator(TEXTS * 3, vocab_size=400)


def make_model(vocab_size: int, **changes) -> Transformer:
    torch.manual_seed(0)
    settings = {"width": 32, "max_positions": 64, "vocab_size": vocab_size} | changes
    config = ModelConfig.uniform(
        "llama", depth=2, attention=AttentionConfig(4, 2, 8), feed_forward=FeedForwardConfig(48), **settings
    )
    model = Transformer(config).eval()
    redraw(model)
    return model


def uniform(vocab_size: int) -> Transformer:
    """Every token equally likely."""
    model = make_model(vocab_size)
    model.lm_head.weight.data.zero_()
    return model


class Rows:
    """A source over fixed rows; like a real one it fills its last step up with the first rows of the next epoch."""

    def __init__(self, batch: Batch, rows_per_step: int, *, endless: bool = False) -> None:
        self.whole, self.rows_per_step = batch, rows_per_step
        self.rows_per_epoch = 0 if endless else len(batch)
        self.steps_per_epoch = 0 if endless else math.ceil(len(batch) / rows_per_step)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        stop = self.rows_per_step if stop is None else stop
        index = [(step * self.rows_per_step + i) % len(self.whole) for i in range(start, stop)]
        b = self.whole
        return Batch(b.ids[index], b.targets[index], b.positions[index], b.documents[index])

    def fingerprint(self):
        return {}


def pack(documents: list[list[int]], width: int) -> Batch:
    """Documents one after the other; one that does not fit a row starts the next."""
    rows: list[list[tuple[int, int]]] = [[]]
    for ids in documents:
        if len(rows[-1]) + len(ids) > width:
            rows.append([])
        number = rows[-1][-1][1] + 1 if rows[-1] else 0
        rows[-1] += [(token, number) for token in ids]
    table = torch.tensor([row + [(0, -1)] * (width - len(row)) for row in rows])
    ids, numbers = table[..., 0], table[..., 1]
    return Batch(ids, next_token_targets(ids, numbers), document_positions(numbers), numbers)


def documents(tokenizer: Tokenizer, texts=TEXTS) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def test_a_uniform_model_costs_log2_of_the_vocabulary_a_token(fine, coarse):
    for tokenizer in (fine, coarse):
        found = evaluate_strings(uniform(tokenizer.size), tokenizer, TEXTS)
        cut = documents(tokenizer)
        assert found.tokens == sum(len(ids) - 1 for ids in cut)  # all but the first of each document
        assert found.bytes == sum(
            len(text.encode()) - len(tokenizer.token_bytes(ids[0])) for text, ids in zip(TEXTS, cut, strict=True)
        )
        assert math.isclose(found.perplexity, tokenizer.size, rel_tol=1e-5)
        assert math.isclose(found.bits_per_byte, math.log2(tokenizer.size) * found.tokens / found.bytes, rel_tol=1e-5)


def test_bits_per_byte_compare_across_tokenizers(fine, coarse):
    """A model that gives each token 256^-bytes costs eight bits a byte (but for the norm of such a distribution)
    whatever the tokenizer, while its loss a token follows the tokens' length."""
    found = {}
    for name, tokenizer in (("fine", fine), ("coarse", coarse)):
        model = make_model(tokenizer.size, width=32)
        special = set(tokenizer.special.values())
        sizes = torch.tensor([1.0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.size)])
        for parameter in model.parameters():
            parameter.data.zero_()
        model.model.embed_tokens.weight.data[:, 0] = 1.0  # every hidden state is the same
        model.model.norm.weight.data.fill_(1.0)
        model.lm_head.weight.data[:, 0] = -sizes * math.log(256) / math.sqrt(32)
        found[name] = held = evaluate_strings(model, tokenizer, TEXTS)
        norm = math.log2(float((256.0**-sizes).sum()))
        ends = len(TEXTS)
        expected = 8 + (8 * ends + norm * held.tokens) / held.bytes
        assert math.isclose(held.bits_per_byte, expected, rel_tol=1e-4)
    assert found["coarse"].loss > 1.5 * found["fine"].loss
    assert abs(found["coarse"].bits_per_byte - found["fine"].bits_per_byte) < 0.2


def test_loss_equals_that_of_transformers(fine, tmp_path):
    theirs = make_oracle("qwen3", vocab_size=fine.size, max_position_embeddings=512)
    ours = load_model(save_theirs(theirs, tmp_path))
    found = evaluate_strings(ours, fine, TEXTS, context=512)
    nats = 0.0
    for ids in documents(fine):
        with torch.no_grad():
            nats += float(theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss) * (len(ids) - 1)
    assert math.isclose(found.nats, nats, rel_tol=1e-5)


@pytest.mark.parametrize("rows_per_step", [1, 2, 5])
def test_packed_rows_give_each_document_its_own_loss_once(fine, rows_per_step):
    model = make_model(fine.size, max_positions=512)
    short = [text[:40] for text in TEXTS] * 3 + ["another", "还有一个"]
    cut = documents(fine, short)
    source = Rows(pack(cut, max(map(len, cut)) + 7), rows_per_step)
    packed = evaluate_text(model, source, tokenizer=fine)
    alone = evaluate_strings(model, fine, short, context=512)
    assert (packed.tokens, packed.bytes) == (alone.tokens, alone.bytes)
    assert math.isclose(packed.nats, alone.nats, rel_tol=1e-5)


def test_shards_give_the_bytes_of_the_text_they_came_from(fine, tmp_path):
    """Rows of 24 tokens cut through documents; still each token counts once, and all bytes but the first tokens'."""
    shards = build_shards([Document(str(i), text) for i, text in enumerate(TEXTS)], fine, tmp_path)
    model = uniform(fine.size)
    for shuffle in (False, True):
        source = ShardedText(shards, seq_len=24, rows_per_step=5, shuffle=shuffle)
        found = evaluate_text(model, source, tokenizer=fine)
        first = sum(len(fine.token_bytes(fine.encode(text)[0])) for text in TEXTS)
        assert found.bytes == shards.text_bytes - first
        assert found.tokens == shards.tokens - shards.documents
        assert math.isclose(found.bits_per_byte, math.log2(fine.size) * found.tokens / found.bytes, rel_tol=1e-5)


def test_many_documents_of_many_lengths_are_batched_without_loss(fine):
    model = make_model(fine.size, max_positions=512)
    texts = [TEXTS[i % 3][: 1 + i * 7 % 90] for i in range(60)]
    together = evaluate_strings(model, fine, texts)
    alone = [evaluate_strings(model, fine, [text]) for text in texts]
    assert (together.tokens, together.bytes) == (sum(a.tokens for a in alone), sum(a.bytes for a in alone))
    assert math.isclose(together.nats, sum(a.nats for a in alone), rel_tol=1e-5)


def test_without_a_tokenizer_there_are_no_bytes(fine):
    batch = pack(documents(fine), 600)
    found = evaluate_text(make_model(fine.size), Rows(batch, 2))
    assert found.bytes is None and found.bits_per_byte is None
    assert found.row().keys() == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}


def test_max_rows_takes_the_first(fine):
    model = uniform(fine.size)
    batch = pack(documents(fine, [text[:30] for text in TEXTS] * 4), 130)
    for rows in (1, 2, 3, 100):
        found = evaluate_text(model, Rows(batch, 2), max_rows=rows)
        assert found.tokens == int((batch.targets[:rows] >= 0).sum())
    endless = Rows(batch, 2, endless=True)
    assert evaluate_text(model, endless, max_rows=2).tokens == int((batch.targets[:2] >= 0).sum())
    with pytest.raises(HanlinError, match="no end"):
        evaluate_text(model, endless)


@pytest.mark.parametrize(("context", "stride"), [(8, 1), (8, 3), (8, 8), (16, None), (64, 32)])
def test_long_texts_are_read_in_windows_and_each_token_is_predicted_once(fine, context, stride):
    model = make_model(fine.size)
    found = evaluate_strings(model, fine, TEXTS, context=context, stride=stride)
    step = stride or context // 2
    nats = 0.0
    for ids in documents(fine):
        for place in range(1, len(ids)):
            if place <= context:
                begin = 0
            else:  # the end of the window in which this token is new, less the window
                end = context + 1 + math.ceil((place - context) / step) * step
                begin = min(end, len(ids)) - context - 1
            with torch.no_grad():
                logits = model(torch.tensor([ids[begin:place]]), logits="last").logits[0, 0]
            nats -= float(logits.log_softmax(-1)[ids[place]])
    assert found.tokens == sum(len(ids) - 1 for ids in documents(fine))
    assert math.isclose(found.nats, nats, rel_tol=1e-5)


def test_files_of_any_kind_are_documents(fine, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS[1:])
    (tmp_path / "b.jsonl").write_text(rows, encoding="utf-8")
    model = make_model(fine.size)
    assert evaluate_files(model, fine, [tmp_path]) == evaluate_strings(model, fine, TEXTS)


def test_the_model_is_left_as_it_was(fine):
    model = make_model(fine.size).train()
    evaluate_strings(model, fine, TEXTS)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_nothing_to_predict_is_said(fine):
    model = make_model(fine.size)
    for texts in ([], [""]):
        with pytest.raises(HanlinError, match="no token that can be predicted"):
            evaluate_strings(model, fine, texts)
    with pytest.raises(HanlinError, match="context is 65 tokens; it must be between 1 and the 64"):
        evaluate_strings(model, fine, TEXTS, context=65)
    with pytest.raises(HanlinError, match="stride is 9; it must be between 1 and the context of 8"):
        evaluate_strings(model, fine, TEXTS, context=8, stride=9)


def test_a_hopeless_model_has_infinite_perplexity_and_no_error():
    assert HeldOut(nats=10_000.0, tokens=1, bytes=4).perplexity == math.inf
