"""Prefix and permutation language models: what a loss may depend on, and plain loops over single rows, fp64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_families import decoder, xlnet

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.data.corruption.batches import PermutationBatch, PrefixBatch
from hanlin.data.corruption.rows import PermutationRows, PrefixRows
from hanlin.data.pretraining_batches import CorruptedText, ListedDocuments
from hanlin.nn.losses import IGNORE
from hanlin.nn.masks import Mask
from hanlin.train.objectives.permutation_lm import PermutationLM
from hanlin.train.objectives.prefix_lm import PrefixLM

VOCABULARY, PAD = 80, 73


def batch_of(maker, rows: int = 5) -> Batch:
    chance = np.random.default_rng(1)
    documents = ListedDocuments([chance.integers(0, 60, chance.integers(4, 24)) for _ in range(9)])
    batch = CorruptedText(documents, maker, rows_per_step=rows).batch(0)
    assert (batch.documents < 0).any(), "padding must be part of the test"
    return batch


def prefix_batch() -> PrefixBatch:
    batch = batch_of(PrefixRows(16, end_id=71, pad_id=PAD))
    assert isinstance(batch, PrefixBatch)
    return batch


def permutation_batch(**settings) -> PermutationBatch:
    batch = batch_of(PermutationRows(16, PAD, (71, 70), one_in=3.0, **settings))
    assert isinstance(batch, PermutationBatch)
    return batch


class ByHand(Mask):
    """A mask given as a matrix of booleans."""

    def __init__(self, visible: torch.Tensor) -> None:
        self.visible = visible

    def sees(self, row, q, k):
        return self.visible[q, k]


def test_prefix_loss_is_that_of_each_row_alone_under_a_mask_made_by_loops():
    model, batch = decoder(VOCABULARY).double(), prefix_batch()
    ((total, name),), metrics = PrefixLM().loss(model, batch)
    expected, count = 0.0, 0
    for row in range(len(batch)):
        real, prefix = int((batch.documents[row] >= 0).sum()), int(batch.prefix[row])
        visible = torch.tensor([[k <= q or k < prefix for k in range(real)] for q in range(real)])
        logits = model(batch.ids[row : row + 1, :real], mask=ByHand(visible)).logits[0]
        expected += F.cross_entropy(logits[prefix - 1 : -1], batch.ids[row, prefix:real], reduction="sum")
        count += real - prefix
    assert abs(total - expected) <= 1e-10 * abs(expected) and name == "tokens"
    assert PrefixLM().count(batch) == {"tokens": count} and metrics["loss"][1] == count


@pytest.mark.parametrize("settings", [{}, {"spans": None}, {"context_ordered": True}])
def test_a_permutation_loss_knows_what_comes_before_in_the_order_and_nothing_else(settings):
    """Each predicted place alone: another token at a place of lower rank changes its loss, elsewhere it must not."""
    model, batch = xlnet(VOCABULARY).double(), permutation_batch(**settings)
    ((total, _),), _ = PermutationLM().loss(model, batch)
    assert PermutationLM().count(batch) == {"tokens": float((batch.predict >= 0).sum())}
    parts = 0.0
    for row in range(len(batch)):
        for place in batch.predict[row][batch.predict[row] >= 0].tolist():
            loss = loss_at(model, batch, row, place, batch.ids)
            parts += loss
            for other in range(batch.ids.shape[1]):
                changed = batch.ids.clone()
                changed[row, other] = (changed[row, other] + 1) % 60
                moved = abs(loss_at(model, batch, row, place, changed) - loss) > 1e-9
                assert moved == bool(batch.order[row, other] < batch.order[row, place]), (row, place, other)
    assert abs(total - parts) <= 1e-10 * abs(parts)


def loss_at(model, batch: PermutationBatch, row: int, place: int, ids: torch.Tensor) -> torch.Tensor:
    """The loss of one predicted place; its target is the true token whatever `ids` says."""
    targets = torch.full_like(batch.targets[row : row + 1], IGNORE)
    targets[0, place] = batch.targets[row, place]
    part = slice(row, row + 1)
    alone = PermutationBatch(
        ids[part], targets, batch.positions[part], batch.documents[part], order=batch.order[part],
        predict=torch.tensor([[place, -1]]),
    )  # fmt: skip
    with torch.no_grad():
        ((loss, _),), _ = PermutationLM().loss(model, alone)
    return loss


def test_padding_changes_no_permutation_loss():
    model, batch = xlnet(VOCABULARY).double(), permutation_batch()
    ((total, _),), _ = PermutationLM().loss(model, batch)
    parts = 0.0
    for row in range(len(batch)):
        real = int((batch.documents[row] >= 0).sum())
        part = slice(row, row + 1)
        short = [t[part, :real] for t in (batch.ids, batch.targets, batch.positions, batch.documents)]
        alone = PermutationBatch(*short, order=batch.order[part, :real], predict=batch.predict[part])
        ((loss, _),), _ = PermutationLM().loss(model, alone)
        parts += loss
    assert abs(total - parts) <= 1e-10 * abs(parts)


def test_what_does_not_fit_is_refused():
    with pytest.raises(HanlinError, match="PrefixLM learns from a PrefixBatch, found a PermutationBatch"):
        PrefixLM().loss(decoder(VOCABULARY), permutation_batch())
    with pytest.raises(HanlinError, match="Two streams need relative attention"):
        PermutationLM().loss(decoder(VOCABULARY), permutation_batch())
