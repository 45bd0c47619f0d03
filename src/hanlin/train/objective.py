"""An `Objective` wires a loss function to a model and a batch; the `Trainer` knows objectives only.

A loss is a sum with the name of its denominator. Denominators are counted by `count` over *all* micro-batches and ranks
of an optimizer step before the first backward, and the trainer divides once. So 4 x 8 equals 32, a packed batch equals
its documents alone, and two ranks equal one. Metrics are (sum, count) pairs and reduce by addition.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from hanlin.data.batch import Batch
from hanlin.models.transformer import Output, Transformer
from hanlin.nn.losses import count_targets
from hanlin.nn.masks import Causal, Mask, SameDocument
from hanlin.nn.multi_token import targets_ahead
from hanlin.train.token_loss import token_loss, token_sums

Term = tuple[Tensor, str]  # (un-normalised sum with gradient, name of its denominator)
Metrics = dict[str, tuple[float, float]]  # name -> (sum, count)


class Objective(Protocol):
    """What is being learnt. Implementations are small and hold no training state.

    One with settings of its own that change the weights has `fingerprint() -> dict` as well, JSON of them: a run is not
    continued with others (`train.resume`).
    """

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

    ahead: how many further tokens the model predicts (`ModelConfig.predict_ahead`); the mean of their losses joins with
    weight `ahead_weight` (DeepSeek-V3, arXiv:2412.19437, eq. 25).
    z_loss: weight of the mean of logsumexp(logits)^2 over trained tokens, which keeps logits near 0 (PaLM,
    arXiv:2204.02311, section 5).
    """

    plain_forward = True  # whether `run` is the model's forward pass and nothing more: a pipeline makes it by itself

    def __init__(self, *, ahead: int = 0, ahead_weight: float = 0.3, z_loss: float = 0.0) -> None:
        self.ahead, self.ahead_weight, self.z_loss = ahead, ahead_weight, z_loss

    def count(self, batch: Batch) -> dict[str, float]:
        further = {
            f"tokens_{k}": float(count_targets(targets_ahead(batch.targets, k, batch.documents)))
            for k in range(1, self.ahead + 1)
        }
        return {"tokens": float(count_targets(batch.targets)), **further}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        return self.score(model, self.run(model, batch), batch)

    def run(self, model: Transformer, batch: Batch) -> Output:
        """The forward pass without the head."""
        return model(batch.ids, positions=batch.positions, mask=document_mask(batch), logits=None)

    def score(self, model: Transformer, output: Output, batch: Batch) -> tuple[list[Term], Metrics]:
        """Terms and metrics of what `run` gave. A pipeline calls this on its last stage."""
        hidden = output.hidden
        trained = float(count_targets(batch.targets))
        if self.z_loss:
            total, squares = token_sums(model, hidden, batch.targets)
            terms: list[Term] = [(total, "tokens"), (squares * self.z_loss, "tokens")]
            metrics: Metrics = {"z_loss": (float(squares.detach()), trained)}
        else:
            total = self.cost(model, hidden, batch.targets)
            terms, metrics = [(total, "tokens")], {}
        metrics["loss"] = (float(total.detach()), trained)
        if self.ahead:
            mask = document_mask(batch)
            outputs = model.look_ahead(hidden, batch.ids, positions=batch.positions, mask=mask)
            for k, state in enumerate(outputs, start=1):
                targets = targets_ahead(batch.targets, k, batch.documents)
                further = self.cost(model, state, targets)
                terms.append((further * (self.ahead_weight / self.ahead), f"tokens_{k}"))
                metrics[f"loss_{k}_ahead"] = (float(further.detach()), float(count_targets(targets)))
        return terms, metrics

    def cost(self, model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum over targets (...) of what a token costs, from the hidden states (..., width) that predict them."""
        return token_loss(model, hidden, targets)

    def fingerprint(self) -> dict[str, Any]:
        """JSON of those settings that change the weights and stand nowhere else (`train.resume.identity`): `z_loss` is
        one of the loop's and `ahead` one of the model's."""
        return {"ahead_weight": self.ahead_weight} if self.ahead and self.ahead_weight != 0.3 else {}


def batch_loss(model: Transformer, batch: Batch) -> Tensor:
    """The sum of cross-entropies over the batch's targets, without a gradient: whole, cut, or in a pipeline, where
    every rank asks for the same batch."""
    if model.score_elsewhere is not None:
        return model.score_elsewhere(batch)
    hidden = model(batch.ids, positions=batch.positions, mask=document_mask(batch), logits=None).hidden
    return token_loss(model, hidden, batch.targets).detach()


def document_mask(batch: Batch) -> Mask:
    """`Causal()` where that is exact, `Causal() & SameDocument` where rows hold several documents."""
    return Causal() if batch.one_document_a_row else Causal() & SameDocument(batch.documents)


def step_loss(terms: list[Term], totals: dict[str, float]) -> Tensor:
    """The share of the step's loss that one micro-batch contributes: sum over terms of sum / total.

    A denominator of zero (no trained token in the whole step) contributes exactly zero.
    """
    return torch.stack([value / totals[name] if totals[name] else value * 0.0 for value, name in terms]).sum()
