"""Masked language model, next sentence, sequence to sequence: each loss against plain loops over single rows, fp64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_families import bart, bert, decoder, t5

from hanlin.core.errors import HanlinError
from hanlin.data.corruption.batches import MaskedBatch, Seq2SeqBatch
from hanlin.data.corruption.boundaries import SentenceTable
from hanlin.data.corruption.rows import DenoisingRows, MaskedRows, PairRows, SpanRows
from hanlin.data.pretraining_batches import CorruptedText, ListedDocuments
from hanlin.nn.losses import IGNORE
from hanlin.nn.masks import Bidirectional, Causal
from hanlin.train import Trainer, TrainSettings
from hanlin.train.objectives.masked_lm import MaskedLM
from hanlin.train.objectives.seq2seq import Seq2Seq

VOCABULARY = 80
CLS, SEP, MASK, PAD = 70, 71, 72, 73
SENTENCES = SentenceTable(tuple(b". " if n % 7 == 0 else b"x" for n in range(VOCABULARY)))


def documents(count: int = 12) -> ListedDocuments:
    chance = np.random.default_rng(0)
    return ListedDocuments([chance.integers(0, 60, chance.integers(3, 30)) for _ in range(count)])


def masked_batch(*, pairs: bool, rows: int = 6) -> MaskedBatch:
    kind = {"seq_len": 20, "cls_id": CLS, "sep_id": SEP, "mask_id": MASK, "pad_id": PAD, "replacements": np.arange(60)}
    maker = PairRows(**kind, rate=0.3, sentences=SENTENCES) if pairs else MaskedRows(**kind, rate=0.3)
    batch = CorruptedText(documents(), maker, rows_per_step=rows).batch(0)
    assert isinstance(batch, MaskedBatch) and (batch.documents < 0).any(), "padding must be part of the test"
    return batch


def seq2seq_batch(kind: str, rows: int = 6) -> Seq2SeqBatch:
    makers = {
        "t5": SpanRows(20, SEP, PAD, PAD, tuple(range(79, 73, -1)), density=0.3),
        "bart": DenoisingRows(20, CLS, SEP, SEP, MASK, PAD, SENTENCES),
    }
    batch = CorruptedText(documents(), makers[kind], rows_per_step=rows).batch(0)
    assert isinstance(batch, Seq2SeqBatch) and (batch.source_documents < 0).any()
    return batch


@pytest.mark.parametrize("pairs", [False, True])
def test_masked_loss_is_that_of_each_row_alone_without_its_padding(pairs):
    model, batch = bert(VOCABULARY, pairs=pairs).double(), masked_batch(pairs=pairs)
    terms, metrics = MaskedLM().loss(model, batch)
    expected, nsp = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row in range(len(batch)):
        real = int((batch.documents[row] >= 0).sum())
        segments = None if batch.segments is None else batch.segments[row : row + 1, :real]
        out = model(batch.ids[row : row + 1, :real], segments=segments, mask=Bidirectional())
        expected += F.cross_entropy(out.logits[0], batch.targets[row, :real], ignore_index=IGNORE, reduction="sum")
        if pairs:
            logits = model.get_submodule("next_sentence")(out.hidden)
            nsp += F.cross_entropy(logits, batch.next_sentence[row : row + 1], reduction="sum")
    assert abs(terms[0][0] - expected) <= 1e-10 * abs(expected) and terms[0][1] == "tokens"
    trained = float((batch.targets != IGNORE).sum())
    assert MaskedLM().count(batch) == {"tokens": trained} | ({"pairs": 6.0} if pairs else {})
    if pairs:
        assert abs(terms[1][0] - nsp) <= 1e-10 * abs(nsp) and terms[1][1] == "pairs"
        assert metrics["nsp_loss"][1] == 6 and 0 <= metrics["nsp_accuracy"][0] <= 6
    else:
        assert metrics == {"loss": (pytest.approx(expected.item()), trained)}


@pytest.mark.parametrize(("kind", "build"), [("t5", t5), ("bart", bart)])
def test_sequence_loss_is_that_of_each_pair_alone_without_its_padding(kind, build):
    model, batch = build(VOCABULARY).double(), seq2seq_batch(kind)
    ((total, name),), _ = Seq2Seq().loss(model, batch)
    expected = 0.0
    for row in range(len(batch)):
        inner = int((batch.source_documents[row] >= 0).sum())
        outer = int((batch.documents[row] >= 0).sum())
        source = model.encode(batch.source[row : row + 1, :inner])
        logits = model(batch.ids[row : row + 1, :outer], source=source, mask=Causal()).logits
        expected += F.cross_entropy(logits[0], batch.targets[row, :outer], reduction="sum")
    assert abs(total - expected) <= 1e-10 * abs(expected) and name == "tokens"
    assert Seq2Seq().count(batch) == {"tokens": float((batch.documents >= 0).sum())}


def gradients(model, objective, source, micro: int | None) -> dict[str, torch.Tensor]:
    settings = TrainSettings.model_validate(
        {"batch_size": source.rows_per_step, "steps": 4, "precision": "fp32", "micro_batch_size": micro}
    )
    trainer = Trainer(model.double(), objective, source, settings, quiet=True)
    work = trainer._prepare(0)
    trainer.backward(work, trainer._totals(work, False)[0])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["pairs", "t5", "bart"])
@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_equal_the_whole_step(method, micro):
    """Rows carry unequal numbers of targets; relative L2 of every gradient <= 1e-12. Every weight gets a gradient."""
    kind = {"seq_len": 20, "cls_id": CLS, "sep_id": SEP, "mask_id": MASK, "pad_id": PAD, "replacements": np.arange(60)}
    build, objective, maker = {
        "pairs": (lambda n: bert(n, pairs=True), MaskedLM(), PairRows(**kind, sentences=SENTENCES)),
        "t5": (t5, Seq2Seq(), SpanRows(20, SEP, PAD, PAD, tuple(range(79, 73, -1)))),
        "bart": (bart, Seq2Seq(), DenoisingRows(20, CLS, SEP, SEP, MASK, PAD, SENTENCES)),
    }[method]
    source = CorruptedText(documents(), maker, rows_per_step=8)
    whole, parts = (gradients(build(VOCABULARY), objective, source, size) for size in (None, micro))
    assert whole.keys() == parts.keys() == {name for name, _ in build(VOCABULARY).named_parameters()}
    for name in whole:
        least = 1e-3  # a bias of the keys changes nothing: its gradient is 0 but for rounding
        assert (parts[name] - whole[name]).norm() <= 1e-12 * whole[name].norm().clamp(min=least), name


def test_a_batch_of_another_method_is_refused():
    with pytest.raises(HanlinError, match="Seq2Seq learns from a Seq2SeqBatch, found a MaskedBatch"):
        Seq2Seq().loss(t5(VOCABULARY), masked_batch(pairs=False))
    with pytest.raises(HanlinError, match="MaskedLM learns from a MaskedBatch, found a Seq2SeqBatch"):
        MaskedLM().loss(decoder(VOCABULARY), seq2seq_batch("t5"))
    with pytest.raises(HanlinError, match="no head `next_sentence`"):
        MaskedLM().loss(bert(VOCABULARY), masked_batch(pairs=True))
