"""An `Objective` wires a loss function to a model and a batch; the `Trainer` knows objectives only.

A loss is a sum with the name of its denominator. Denominators are counted by `count` over *all* micro-batches and ranks
of an optimizer step before the first backward, and the trainer divides once. So 4 x 8 equals 32, a packed batch equals
its documents alone, and two ranks equal one. Metrics are (sum, count) pairs and reduce by addition.
"""

from typing import Protocol

import torch
from torch import Tensor

from hanlin.data.batch import Batch
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import count_targets, linear_cross_entropy
from hanlin.nn.masks import Causal, Mask, SameDocument

Term = tuple[Tensor, str]  # (un-normalised sum with gradient, name of its denominator)
Metrics = dict[str, tuple[float, float]]  # name -> (sum, count)


class Objective(Protocol):
    """What is being learnt. Implementations are small and hold no training state."""

    def count(self, batch: Batch) -> dict[str, float]:
        """Denominators of this (micro-)batch by name, without running the model. Summed over the optimizer step."""
        ...

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        """Terms whose `sum / total(denominator)` add up to the loss, and metrics to log."""
        ...


class CausalLM:
    """Next-token prediction. With packed documents each token sees its own document only.

    The loss is the mean over trained tokens; `targets` of the batch decide which those are, so pretraining and
    supervised fine-tuning are this same objective over different batches.
    """

    def count(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(count_targets(batch.targets))}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        hidden = model(batch.ids, positions=batch.positions, mask=document_mask(batch), logits=None).hidden
        total = linear_cross_entropy(hidden, model.head_weight, batch.targets)
        value = float(total.detach())
        return [(total, "tokens")], {"loss": (value, float(count_targets(batch.targets)))}


def document_mask(batch: Batch) -> Mask:
    """`Causal()` where that is exact, `Causal() & SameDocument` where rows hold several documents."""
    return Causal() if batch.one_document_a_row else Causal() & SameDocument(batch.documents)


def step_loss(terms: list[Term], totals: dict[str, float]) -> Tensor:
    """The share of the step's loss that one micro-batch contributes: sum over terms of sum / total.

    A denominator of zero (no trained token in the whole step) contributes exactly zero.
    """
    return torch.stack([value / totals[name] if totals[name] else value * 0.0 for value, name in terms]).sum()
