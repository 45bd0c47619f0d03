"""KTO (arXiv:2402.01306): answers that were called good or bad one by one, without a partner.

    r(y) = log pi(y | x) - log pi_ref(y | x)                  z = max(0, mean of r over prompts with answers of others)
    loss = mean of   w_good (1 - sigmoid(beta (r - z)))  for good answers,
                     w_bad (1 - sigmoid(beta (z - r)))   for bad ones

z is a point to measure from and has no gradient. It belongs to the whole optimizer step: it is computed once, over all
its rows and ranks, before the first micro-batch, and stands in the batch.
"""

from typing import Any

import torch

from hanlin.align.method import Parts, Wiring
from hanlin.align.preference import REFERENCE, open_reference, wire_judged
from hanlin.align.preference_loss import kto_anchor, kto_loss
from hanlin.align.preference_recipe import KtoObjective
from hanlin.align.reference import Annotated, Notes, Reference, looking, trained_logprobs
from hanlin.align.sequence_sums import sum_by_sequence
from hanlin.data.batch import Batch, BatchSource
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.models.transformer import Transformer
from hanlin.parallel.processes import over_all
from hanlin.train.objective import Metrics, Term
from hanlin.train.token_loss import expect

ANCHOR = "anchor"  # z, with every answer


class Kto:
    """An `Objective` over answers with labels, as `AnchoredAnswers` gives them."""

    def __init__(self, choice: KtoObjective) -> None:
        self.choice = choice

    def fingerprint(self) -> dict[str, Any]:
        return self.choice.model_dump(mode="json", include={"kind", "beta", "good_weight", "bad_weight"})

    def count(self, batch: Batch) -> dict[str, float]:
        return {"answers": float(expect(batch, SequenceBatch, self).sequences)}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        batch = expect(batch, SequenceBatch, self)
        trained = batch.trained
        said = sum_by_sequence(trained_logprobs(model, batch), trained.sequence, trained.count)  # (answers,)
        change = said - batch.of_sequences(REFERENCE)
        good, anchor = batch.of_sequences("label") > 0, batch.of_sequences(ANCHOR)
        total, metrics = kto_loss(
            change, good, anchor, beta=self.choice.beta, good_weight=self.choice.good_weight,
            bad_weight=self.choice.bad_weight,
        )  # fmt: skip
        return [(total, "answers")], metrics | {"kl": (float(anchor.sum()), float(len(anchor)))}


class AnchoredAnswers(Annotated):
    """Answers with the reference's log-probabilities and z. mismatched: prompts with answers of others, as many rows a
    step; the policy and the reference are asked about them when a step is made."""

    def __init__(
        self, source: BatchSource, mismatched: BatchSource, model: Transformer, reference: Reference, rows: int | None
    ) -> None:
        about = {"anchor": mismatched.fingerprint()}
        super().__init__(source, self._of_reference, device=lambda: model.device, rows=rows, about=about)
        self._model, self._reference = model, reference
        self._mismatched = Annotated(mismatched, self._changes, device=lambda: model.device, rows=rows, about={})

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> SequenceBatch:
        batch = super().batch(step, start, stop)
        changes = self._mismatched.batch(step, start, stop).of_sequences("change")
        total, count = over_all(kto_anchor(changes)).tolist()
        anchor = torch.full((batch.sequences,), max(0.0, total / count), dtype=changes.dtype)
        return batch.with_numbers({ANCHOR: anchor})

    def _of_reference(self, part: SequenceBatch) -> Notes:
        with self._reference.model() as model:
            return Notes({REFERENCE: _answers(model, part)}, {})

    def _changes(self, part: SequenceBatch) -> Notes:
        with looking(self._model):
            said = _answers(self._model, part)
        with self._reference.model() as model:
            return Notes({"change": said - _answers(model, part)}, {})


def _answers(model: Transformer, part: SequenceBatch) -> torch.Tensor:
    """The log-probability of each answer: (answers,)."""
    return sum_by_sequence(trained_logprobs(model, part), part.trained.sequence, part.trained.count)


def wire_kto(parts: Parts) -> Wiring:
    """Labelled answers with z, and an evaluation on held-out ones."""
    choice = parts.recipe.objective
    assert isinstance(choice, KtoObjective)
    reference = open_reference(parts.model, choice.reference)

    def source(raw: BatchSource, name: str) -> BatchSource:
        return AnchoredAnswers(raw, parts.data.more[name], parts.model, reference, parts.settings.micro_batch_size)

    return wire_judged(parts, Kto(choice), source)
