"""Learning from pairs of answers: DPO (arXiv:2305.18290) and its family as one objective over packed pairs.

    u(y)  = sum over the answer's tokens of log pi(y_t) - log pi_ref(y_t)          what the policy changed
    Delta = u(chosen) - u(rejected)                    loss = -log sigmoid(beta * Delta), mean over the pairs

The other kinds differ in the numbers that go into the comparison and in the link (`align.preference_loss`): IPO, SimPO
and ORPO take means over an answer's tokens; SimPO and ORPO have no reference; TDPO adds D (`align.tdpo`). A batch holds
pairs side by side, chosen first. What the reference says stands in the batch, computed once a step and without a
gradient (`align.reference`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanlin.align.health import watch_of
from hanlin.align.health_report import write_health
from hanlin.align.method import Parts, Wiring
from hanlin.align.preference_loss import preference_loss
from hanlin.align.preference_recipe import PreferenceObjective
from hanlin.align.reference import Annotated, Notes, Reference, trained_hidden
from hanlin.align.sequence_sums import sum_by_sequence
from hanlin.align.tdpo import logprobs_and_divergence
from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch, BatchSource
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.evaluate.perplexity import rows_once
from hanlin.models import load_model
from hanlin.models.transformer import Transformer
from hanlin.train.objective import Metrics, Objective, Term
from hanlin.train.token_loss import expect, head_of, token_logprobs

REFERENCE, REFERENCE_STATES = "reference", "reference_states"  # of an answer: its log-probability; of a token
AVERAGED = ("ipo", "simpo", "orpo")  # kinds that compare means over an answer's tokens


class Preferences:
    """An `Objective` over pairs. reference: of the kinds that have one."""

    def __init__(self, choice: PreferenceObjective, reference: Reference | None = None) -> None:
        self.choice, self.reference = choice, reference
        self.tokenwise = choice.kind in ("tdpo1", "tdpo2")

    def fingerprint(self) -> dict[str, Any]:
        options = ("beta", "smoothing", "penalty", "alpha", "gamma", "sft")
        values = {option: self.choice.value(option) for option in options}
        return {"kind": self.choice.kind, "margin": self.choice.margin, **values}

    def annotate(self, part: SequenceBatch) -> Notes:
        """What the reference says: the log-probability of every answer, for TDPO the states before its head too."""
        assert self.reference is not None
        with self.reference.model() as model:
            hidden = trained_hidden(model, part)
            logps = token_logprobs(model, hidden, part.trained.ids)[0]
            states = {REFERENCE_STATES: head_of(model, hidden)[0]} if self.tokenwise else {}
        return Notes({REFERENCE: sum_by_sequence(logps, part.trained.sequence, part.trained.count)}, states)

    def count(self, batch: Batch) -> dict[str, float]:
        batch = expect(batch, SequenceBatch, self)
        chosen = batch.trained.sequence % 2 == 0
        return {"pairs": batch.sequences / 2, "tokens": float(chosen.sum())}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        batch = expect(batch, SequenceBatch, self)
        trained, choice = batch.trained, self.choice
        logps, apart = self._tokens(model, batch)
        said = sum_by_sequence(logps, trained.sequence, trained.count)  # (answers,)
        reference = batch.of_sequences(REFERENCE).to(said.dtype) if choice.needs_reference else torch.zeros_like(said)
        sums = said
        if choice.kind in AVERAGED:
            lengths = torch.bincount(trained.sequence, minlength=trained.count)
            said, reference = said / lengths, reference / lengths
        margin = batch.of_sequences("margin")[0::2] if choice.margin else None
        divergence = sum_by_sequence(apart, trained.sequence, trained.count) if apart is not None else None
        total, metrics = self._compare(said, reference, divergence, margin)
        terms: list[Term] = [(total, "pairs")]
        found = {"logps/chosen": sums[0::2], "logps/rejected": sums[1::2]}
        if divergence is not None:
            found |= {"kl/chosen": divergence[0::2], "kl/rejected": divergence[1::2]}
        more: Metrics = {name: (float(v.detach().sum()), float(len(v))) for name, v in found.items()}
        if weight := choice.value("sft"):
            chosen = trained.sequence % 2 == 0
            nll = -logps[chosen].sum()
            terms.append((nll * weight, "tokens"))
            more["sft_loss"] = (float(nll.detach()), float(chosen.sum()))
        return terms, metrics | more

    def _tokens(self, model: Transformer, batch: SequenceBatch) -> tuple[Tensor, Tensor | None]:
        """Of every trained token its log-probability and, for TDPO, how far the policy is from the reference there."""
        hidden, ids = trained_hidden(model, batch), batch.trained.ids
        if not self.tokenwise:
            return token_logprobs(model, hidden, ids)[0], None
        assert self.reference is not None
        with self.reference.model() as reference:
            head = head_of(reference, hidden.detach())[1]
        return logprobs_and_divergence(model, hidden, ids, batch.of_trained(REFERENCE_STATES), head)

    def _compare(
        self, said: Tensor, reference: Tensor, apart: Tensor | None, margin: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        """The sum over the pairs of what the kind makes of their numbers, each (answers,)."""
        value = self.choice.value
        return preference_loss(
            said[0::2], said[1::2], reference[0::2], reference[1::2], kind=self.choice.kind, beta=value("beta"),
            smoothing=value("smoothing"), penalty=value("penalty"), alpha=value("alpha"), gamma=value("gamma"),
            margin=0.0 if margin is None else margin, divergence_chosen=None if apart is None else apart[0::2],
            divergence_rejected=None if apart is None else apart[1::2],
        )  # fmt: skip


def wire_preferences(parts: Parts) -> Wiring:
    """Pairs with what the reference says of them, and an evaluation on held-out pairs from before the first step."""
    choice = parts.recipe.objective
    assert isinstance(choice, PreferenceObjective)
    reference = open_reference(parts.model, choice.reference) if choice.needs_reference else None
    objective = Preferences(choice, reference)

    def source(raw: BatchSource, name: str) -> BatchSource:
        if reference is None:
            return raw
        return Annotated(
            raw, objective.annotate, device=lambda: parts.model.device, rows=parts.settings.micro_batch_size,
            about={"reference": str(choice.reference or "the model as it was")},
        )  # fmt: skip

    return wire_judged(parts, objective, source)


def wire_judged(parts: Parts, objective: Objective, source: Callable[[BatchSource, str], BatchSource]) -> Wiring:
    """An objective over judged answers: `source(raw, name)` adds to the batches of "data" and "eval" what it needs."""
    held_out = {name: (source(raw, name), raw) for name, raw in parts.data.held_out.items()}
    evaluate = None
    if held_out:
        evaluate = partial(evaluate_judged, objective, held_out, parts.recipe.objective.held_out_rows)
    run = parts.run
    return Wiring(
        objective, source(parts.data.source, "data"), evaluate, evaluate is not None, watch=watch_of(run),
        finish=None if run is None else partial(write_health, run),
    )  # fmt: skip


def evaluate_judged(
    objective: Objective,
    sources: Mapping[str, tuple[BatchSource, BatchSource]],
    most: int,
    model: Transformer,
    step: int,
) -> dict[str, float]:
    """Loss and metrics of an objective on the first `most` rows of an epoch of each source. sources: by name, what
    gives the batches, and the packed rows beneath it."""
    found: dict[str, float] = {}
    for name, (source, raw) in sources.items():
        rows = min(most, getattr(raw, "rows_per_epoch", most))
        counted: dict[str, float] = {}
        sums: dict[str, float] = {}
        metrics: Metrics = {}
        for batch in rows_once(source, rows):
            batch = batch.to(model.device)
            terms, told = objective.loss(model, batch)
            for key, value in objective.count(batch).items():
                counted[key] = counted.get(key, 0.0) + value
            for value, key in terms:
                sums[key] = sums.get(key, 0.0) + float(value)
            for key, (value, count) in told.items():
                before = metrics.get(key, (0.0, 0.0))
                metrics[key] = (before[0] + value, before[1] + count)
        found[f"{name}/loss"] = sum(value / counted[key] for key, value in sums.items() if counted[key])
        found |= {f"{name}/{key}": value / count for key, (value, count) in metrics.items() if count}
    return found


def open_reference(model: Transformer, folder: Path | None) -> Reference:
    """The reference of a run: the model in `folder`, else the model as training finds it."""
    if folder is None:
        return Reference(model)
    other = load_model(folder, dtype=torch.float32, device="cpu")
    if other.config.vocab_size != model.config.vocab_size:
        raise HanlinError(
            f"objective.reference {folder} knows {other.config.vocab_size} tokens, the model "
            f"{model.config.vocab_size}: give a model with the same tokenizer."
        )
    return Reference(model, other)
