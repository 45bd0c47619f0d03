"""Selection by scores; difficulty and Nuggets through the engine, against plain forwards of the same model."""

import math
import random
from dataclasses import replace

import pytest
import torch
from tests.serve.tiny import make_folder

from hanlin.align.selection.decisions import keep_above, keep_top
from hanlin.align.selection.difficulty import answer_losses, select_by_difficulty
from hanlin.align.selection.nuggets import golden_scores
from hanlin.align.selection.reward import select_by_reward
from hanlin.align.selection.scoring import embed_texts
from hanlin.align.synthesis.writers import EngineWriter
from hanlin.core.errors import HanlinError
from hanlin.engine import Engine
from hanlin.models import Transformer, load_model
from hanlin.tokens import Tokenizer

PAIRS = [
    ("What does the quick brown fox jump over?", "It jumps over the lazy dog."),
    ("狗在意吗？", "狗并不在意。"),
    ("Write a function that adds.", "def add(a, b): return a + b"),
    ("翰林院是什么地方？", "是古代读书人向往的地方。"),
    ("What does json.dumps do?", "It writes an object as JSON."),
]


def chat(question: str, answer: str, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CHATS = [chat(*pair) for pair in PAIRS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "tiny", context=512)


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.from_folder(folder, dtype="float32", page_size=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(folder):
    return load_model(folder, dtype=torch.float32).eval(), Tokenizer.load(folder)


@torch.inference_mode()
def forward_logprobs(model, ids: list[int]) -> list[float]:
    """log p of every token but the first."""
    rows = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [float(rows[i, token]) for i, token in enumerate(ids[1:])]


def last_answer(tokenizer, messages) -> tuple[list[int], int]:
    """A conversation's ids up to the end of its last answer, and where that begins, from the template's two texts."""
    start = len(tokenizer.chat(messages[:-1], generate=True))
    ids = tokenizer.chat(messages, generate=False)
    end = max(place for place, token in enumerate(ids) if token in tokenizer.stop_ids)
    return ids[: end + 1], start


def test_the_best_and_those_above_are_what_sorting_says():
    chances = random.Random(0)
    scores = [chances.choice([None, *range(9)]) for _ in range(50)]
    judged = sorted((i for i, s in enumerate(scores) if s is not None), key=lambda i: (-scores[i], i))
    selection = keep_top(scores, 13, named="score")
    assert selection.kept == sorted(judged[:13]) and selection.threshold == scores[judged[12]]
    assert keep_above(scores, 5, named="score").kept == [i for i, s in enumerate(scores) if s is not None and s >= 5]
    assert keep_above(scores, 9, named="score").facts == ("no score reaches 9; the highest is 8",)
    with pytest.raises(HanlinError, match="score of example 2 is NaN"):
        keep_top([1.0, math.nan], 1, named="score")


def test_length_bins_keep_the_lengths_there_were():
    """A judge that likes long answers, and nothing else: without bins only they are kept, with bins every length."""
    chances = random.Random(1)
    lengths = [chances.randint(1, 1000) for _ in range(200)]
    scores = [length + chances.random() for length in lengths]
    plain = select_by_reward(scores, 50)
    binned = select_by_reward(scores, 50, lengths=lengths, bins=10)
    mean = sum(lengths) / 200
    assert sum(lengths[i] for i in plain.kept) / 50 > 1.5 * mean
    assert sum(lengths[i] for i in binned.kept) / 50 == pytest.approx(mean, rel=0.1)
    assert len(binned.kept) == 50
    order = sorted(range(200), key=lambda i: (lengths[i], i))
    for part in range(10):
        group = order[part * 20 : part * 20 + 20]
        assert set(binned.kept) & set(group) == set(sorted(group, key=lambda i: -scores[i])[:5])
    for n, keep, bins in [(7, 3, 5), (3, 2, 5), (7, 7, 4), (9, 1, 2)]:
        assert len(select_by_reward(scores[:n], keep, lengths=lengths[:n], bins=bins).kept) == keep


def test_losses_are_those_of_plain_forwards_and_ifd_their_ratio(engine, plain):
    model, tokenizer = plain
    special = set(tokenizer.special.values())
    found = answer_losses(engine, CHATS, alone=True)
    for messages, (behind, without) in zip(CHATS, found, strict=True):
        ids, start = last_answer(tokenizer, messages)
        told = forward_logprobs(model, ids)
        answer = [(token, told[place - 1]) for place, token in enumerate(ids) if place >= start]
        words = [(token, value) for token, value in answer if token not in special]
        assert tokenizer.decode([token for token, _ in words]) == messages[-1]["content"]
        assert behind == pytest.approx(-sum(value for _, value in words) / len(words), abs=1e-5)
        alone = forward_logprobs(model, [tokenizer.eos_id, *(token for token, _ in words)])
        assert without == pytest.approx(-sum(alone) / len(alone), abs=1e-5)
    scores = [behind / without for behind, without in found]
    useful = [i for i, score in enumerate(scores) if score < 1]
    selection = select_by_difficulty(found, len(useful), measure="ifd", part="top")
    assert selection.kept == useful
    assert all("does not help" in d.reason for i, d in enumerate(selection.decisions) if i not in useful)


@pytest.mark.parametrize(("part", "wanted"), [("top", [3, 5]), ("middle", [0, 1]), ("bottom", [2, 4])])
def test_the_part_of_the_ranking_that_is_kept(part, wanted):
    losses = [(2.0, 4.0), (1.9, 4.0), (1.0, 4.0), (3.0, 4.0), (0.5, 4.0), (3.5, 4.0), (5.0, 4.0), None, (0.0, 0.0)]
    selection = select_by_difficulty(losses, 2, measure="ifd", part=part)
    assert selection.kept == wanted
    assert "1.25 >= 1" in selection.decisions[6].reason and "context" in selection.decisions[7].reason
    assert selection.decisions[8].score is None
    perplexity = select_by_difficulty(losses, 1, measure="perplexity", part="top")
    assert perplexity.kept == [6] and perplexity.decisions[6].score == pytest.approx(math.exp(5))


def test_golden_scores_are_the_papers_count_and_most_tokens_come_from_the_cache(engine, plain):
    model, tokenizer = plain
    golden = golden_scores(engine, CHATS, CHATS)

    def mean(messages) -> float:
        ids, start = last_answer(tokenizer, messages)
        told = forward_logprobs(model, ids)[start - 1 :]
        return sum(told) / len(told)

    for z, shown in enumerate(CHATS):
        wins = [mean([*shown, *asked]) > mean(asked) for j, asked in enumerate(CHATS) if j != z]
        assert golden.scores[z] == sum(wins) / len(wins)
    assert len(set(golden.scores)) > 1
    assert 0.3 < golden.hit_rate < 1


def test_system_messages_are_left_out_and_what_does_not_fit_is_said(engine, folder):
    told = [chat(*pair, system="You are kind.") for pair in PAIRS]
    assert golden_scores(engine, told, CHATS).scores == golden_scores(engine, CHATS, CHATS).scores
    with Engine.from_folder(folder, dtype="float32", max_context=64) as short:
        long = chat("words " * 60, "many")
        assert golden_scores(short, [long, CHATS[1]], CHATS[:2]).scores[0] is None
        assert answer_losses(short, [long], alone=True) == [None]


def test_a_model_that_only_reads_embeds_and_is_refused_where_it_must_write(plain):
    model, tokenizer = plain
    layers = tuple(replace(each, attention=replace(each.attention, bidirectional=True)) for each in model.config.layers)
    reader = Transformer(replace(model.config, layers=layers))
    with Engine(reader, tokenizer) as engine:
        assert embed_texts(engine, ["狗", "dog"]).shape == (2, 32)
        with pytest.raises(HanlinError, match="reads and does not write, so it gives no probability"):
            answer_losses(engine, CHATS, alone=False)
        with pytest.raises(HanlinError, match="reader reads and does not write"):
            EngineWriter(engine, "reader")


def test_embeddings_are_the_engines_and_long_texts_are_cut(engine):
    texts = [answer for _, answer in PAIRS]
    torch.testing.assert_close(embed_texts(engine, texts), engine.embed(texts))
    assert embed_texts(engine, ["long " * 2000]).shape == (1, 32)
