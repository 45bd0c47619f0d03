"""The objective of on-policy methods: make likelier what did better than expected, and stay near the reference.

    loss = policy_loss(log p, advantages)  +  beta KL(policy, reference)  -  bonus * entropy  +  weight * value_loss

Everything without a gradient (advantages, the log-probabilities that answers were drawn with, the reference's, old
values) is a number that the batch carries (`align.experience`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hanlin.align.algorithms import Algorithm
from hanlin.align.critic import critic_of
from hanlin.align.policy_loss import kl_estimate, policy_loss, rollout_weights, value_loss
from hanlin.align.reference import trained_hidden
from hanlin.align.sequence_sums import aggregate
from hanlin.data.batch import Batch
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.models.transformer import Transformer
from hanlin.train.objective import Metrics, Term
from hanlin.train.token_loss import expect, token_logprobs


@dataclass(frozen=True)
class Weights:
    """What the algorithm's row leaves to the recipe. length: the constant of aggregate "constant"; correction:
    arguments of `rollout_weights`."""

    beta: float = 0.0
    temperature: float = 1.0
    entropy: float = 0.0
    value: float = 0.5
    value_clip: float | None = 0.2
    length: int = 1
    correction: dict[str, Any] | None = None


class OnPolicy:
    """An `Objective` over the batches of `Experience`."""

    def __init__(self, algorithm: Algorithm, weights: Weights) -> None:
        self.algorithm, self.weights = algorithm, weights
        self.denominator = {"token": "tokens", "sequence": "sequences", "constant": "sequences"}[algorithm.aggregate]

    def count(self, batch: Batch) -> dict[str, float]:
        batch = expect(batch, SequenceBatch, self)
        weight = batch.of_sequences("counts")
        found = {"tokens": float(weight[batch.trained.sequence].sum()), "sequences": float(weight.sum())}
        return found | {"values": float(len(batch.trained.ids))} if self.algorithm.critic else found

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        batch = expect(batch, SequenceBatch, self)
        row, chosen, trained = self.algorithm, self.weights, batch.trained
        logp, entropy = token_logprobs(
            model, trained_hidden(model, batch), trained.ids, temperature=chosen.temperature, entropy=True
        )
        assert entropy is not None
        drawn, learns = batch.of_trained("drawn"), float(batch.of_sequences("learns").amax())
        old = batch.of_trained("old") if "old" in batch.tokens_of else None
        metrics = _watch(logp if old is None else old, entropy, drawn)
        weight = batch.of_sequences("counts")[trained.sequence]
        if chosen.correction is not None:
            before = logp.detach() if old is None else old
            correction, found = rollout_weights(before, drawn, trained.sequence, trained.count, **chosen.correction)
            weight, metrics = weight * correction, metrics | found
        total, found = policy_loss(
            logp, old, batch.of_trained("advantage"), trained.sequence, trained.count, clip=row.clip, level=row.level,
            form=row.form, dual=row.dual, weight=weight, aggregate=row.aggregate, length=chosen.length,
        )  # fmt: skip
        metrics |= found
        terms: list[Term] = [(total * learns, self.denominator)]
        if "reference" in batch.tokens_of:
            reference = batch.of_trained("reference")
            for kind in ("k1", "k3"):
                metrics[f"kl/{kind}"] = (float(kl_estimate(logp.detach(), reference, kind).sum()), float(len(logp)))
            if row.kl_in_loss is not None and chosen.beta:
                apart = kl_estimate(logp, reference, row.kl_in_loss)
                cost = aggregate(apart * weight, trained.sequence, trained.count, row.aggregate, chosen.length)
                terms.append((cost * chosen.beta * learns, self.denominator))
        if chosen.entropy:
            spread = aggregate(entropy * weight, trained.sequence, trained.count, row.aggregate, chosen.length)
            terms.append((spread * -chosen.entropy * learns, self.denominator))
        if row.critic:
            values = critic_of(model)(batch, dtype=model.compute_dtype)
            cost, found = value_loss(
                values, batch.of_trained("value"), batch.of_trained("return"), trained.sequence, trained.count,
                clip=chosen.value_clip,
            )  # fmt: skip
            terms.append((cost * chosen.value, "values"))
            metrics |= found
        metrics["loss"] = (float(total.detach()), self.count(batch)[self.denominator])
        return terms, {**metrics, **batch.notes}


@torch.no_grad()
def _watch(logp: Tensor, entropy: Tensor, drawn: Tensor) -> Metrics:
    """What a run is judged by, whatever is learnt."""
    n = float(len(logp))
    if not n:
        return {}
    gap = (logp.detach() - drawn).abs()
    return {
        "entropy": (float(entropy.sum()), n),
        "rollout/mismatch_p95": (float(gap.quantile(0.95)) if len(gap) < 2**24 else float(gap.max()), 1.0),
        "rollout/mismatch": (float(gap.sum()), n),
    }
