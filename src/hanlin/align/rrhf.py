"""RRHF (arXiv:2304.05302): several answers to a prompt are ranked as their scores are, and the best one is learnt.

    p_i = log pi(y_i | x) / length_i^alpha
    loss = sum over r_i < r_j of max(0, p_i - p_j)   mean over prompts    +   -log pi(best | x)   mean over its tokens

No reference, no reward model at training time: the scores stand in the data.
"""

from typing import Any

import torch

from hanlin.align.method import Parts, Wiring
from hanlin.align.preference import wire_judged
from hanlin.align.preference_data import FIRST
from hanlin.align.preference_loss import rrhf_loss
from hanlin.align.preference_recipe import RrhfObjective
from hanlin.align.reference import trained_logprobs
from hanlin.align.sequence_sums import sum_by_sequence
from hanlin.data.batch import Batch
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.models.transformer import Transformer
from hanlin.train.objective import Metrics, Term
from hanlin.train.token_loss import expect


class Rrhf:
    """An `Objective` over groups of answers with scores."""

    def __init__(self, choice: RrhfObjective) -> None:
        self.choice = choice

    def fingerprint(self) -> dict[str, Any]:
        return self.choice.model_dump(mode="json", include={"kind", "length_power", "rank_weight"})

    def count(self, batch: Batch) -> dict[str, float]:
        batch = expect(batch, SequenceBatch, self)
        best = best_of_groups(batch)[batch.trained.sequence]
        return {"prompts": float(batch.of_sequences(FIRST).sum()), "tokens": float(best.sum())}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        batch = expect(batch, SequenceBatch, self)
        trained, choice = batch.trained, self.choice
        logps = trained_logprobs(model, batch)
        lengths = torch.bincount(trained.sequence, minlength=trained.count).to(logps.dtype)
        said = sum_by_sequence(logps, trained.sequence, trained.count) / lengths**choice.length_power
        scores, group = batch.of_sequences("score"), groups_of(batch)
        ranking, metrics = rrhf_loss(said, scores, group)
        best = best_of_groups(batch)
        nll = -logps[best[trained.sequence]].sum()
        tokens, prompts = float(best[trained.sequence].sum()), float(batch.of_sequences(FIRST).sum())
        likeliest = first_highest(said.detach(), group)
        found: Metrics = {
            "ranking_loss": (float(ranking.detach()), prompts),
            "sft_loss": (float(nll.detach()), tokens),
            "best_is_likeliest": (float((likeliest & best).sum()), prompts),
        }
        return [(ranking * choice.rank_weight, "prompts"), (nll, "tokens")], metrics | found


def groups_of(batch: SequenceBatch) -> torch.Tensor:
    """Which prompt each answer belongs to: (answers,), 0 ..."""
    return batch.of_sequences(FIRST).long().cumsum(0) - 1


def best_of_groups(batch: SequenceBatch) -> torch.Tensor:
    """(answers,) bool: of each prompt the answer with the highest score, of equal ones the first."""
    return first_highest(batch.of_sequences("score"), groups_of(batch))


def first_highest(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """(n,) bool: of each group the first of its highest values. group (n,): 0, 0, 1, 1, 1 …"""
    groups = int(group[-1]) + 1 if len(group) else 0
    most = values.new_full((groups,), -torch.inf).scatter_reduce(0, group, values, "amax")
    at = (values == most[group]).nonzero().squeeze(-1)
    place = torch.full((groups,), len(values), device=values.device).scatter_reduce(0, group[at], at, "amin")
    return torch.zeros_like(values, dtype=torch.bool).scatter(0, place, True)


def wire_rrhf(parts: Parts) -> Wiring:
    """Ranked answers; there is no reference."""
    choice = parts.recipe.objective
    assert isinstance(choice, RrhfObjective)
    return wire_judged(parts, Rrhf(choice), lambda raw, name: raw)
