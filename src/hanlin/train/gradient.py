"""The gradient of one optimizer step: micro-batches, whatever the layout, with nothing averaged.

    for part in micro-batches:  sum over terms of (sum / total of the whole step)  -> backward
    gradients               ->  summed over the replicas (all at once, or while the last part is computed)

A pipeline runs its micro-batches in the order of its schedule; everybody else one after the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.models.transformer import Output, Transformer
from hanlin.nn.routing import Routing
from hanlin.train.balance import ROUTED, Balance
from hanlin.train.cluster import Cluster
from hanlin.train.monitor import add_metrics
from hanlin.train.objective import CausalLM, Metrics, Objective, Term, document_mask, step_loss
from hanlin.train.prefetch import StepWork


class Gradient:
    """Fills the gradients of `model` for one step at a time. balance: of experts, if it has any."""

    def __init__(self, model: Transformer, objective: Objective, cluster: Cluster, balance: Balance) -> None:
        self.model, self.objective, self.cluster, self.balance = model, objective, cluster, balance
        self.balanced = balance.needed and isinstance(objective, CausalLM)
        asked = balance.choice is not None or balance.z_loss > 0
        if asked and not balance.needed:
            raise HanlinError("train.balance and router_z_loss are for models with experts; this one has none.")
        if not isinstance(objective, CausalLM):
            name = type(objective).__name__
            if asked:
                raise HanlinError(f"Balancing experts is not supported with the objective {name}, only with CausalLM.")
            if cluster.pipeline is not None or cluster.context is not None:
                raise HanlinError(f"{name} cannot be laid over a pipeline or a context axis; CausalLM can.")
        elif not objective.plain_forward and (cluster.pipeline is not None or cluster.context is not None):
            raise HanlinError(
                "objective.neftune needs whole documents and the whole model in each process: set parallel.pipeline "
                "and parallel.context to 1, or leave it out."
            )

    def count(self, batch: Batch) -> dict[str, float]:
        """The objective's denominators of a micro-batch, and the balance's."""
        found = self.objective.count(batch)
        return {**found, ROUTED: float(batch.tokens)} if self.balanced else found

    def __call__(self, work: StepWork, totals: dict[str, float], scale: float = 1.0) -> tuple[Tensor, Metrics]:
        """Fill the gradient, times `scale`, summed over micro-batches and ranks.

        totals: the step's denominators over all ranks. Returns the step's loss (a scalar, not scaled) and this rank's
        metrics.
        """
        cluster = self.cluster
        cluster.begin()
        metrics: Metrics = {}
        parts = [self._mine(part) for part in work.parts]
        if cluster.pipeline is not None:
            loss = self._through_pipeline(parts, totals, scale, metrics)
        else:
            shares: list[Tensor] = []
            for part in parts[:-1]:
                shares.append(self._one(part, totals, scale, metrics))
            with cluster.last():
                shares.append(self._one(parts[-1], totals, scale, metrics))
            loss = torch.stack(shares).sum()
        cluster.finish()
        return cluster.sum_loss(loss), metrics

    def _one(self, part: Batch, totals: dict[str, float], scale: float, metrics: Metrics) -> Tensor:
        """Forward and backward of one micro-batch; its share of the loss."""
        part = part.to(self.cluster.device)
        if isinstance(self.objective, CausalLM):
            terms, found = self._score(self.model, self.objective.run(self.model, part), part)
        else:
            terms, found = self.objective.loss(self.model, part)
        share = step_loss(terms, totals)
        (share if scale == 1.0 else share * scale).backward()
        add_metrics(metrics, found)
        return share.detach()

    def _score(self, model: Transformer, output: Output, part: Batch) -> tuple[list[Term], Metrics]:
        assert isinstance(self.objective, CausalLM)
        terms, found = self.objective.score(model, output, part)
        return [*terms, *self._balance(output.routing, part)], found

    def _balance(self, routing: Sequence[Routing], part: Batch, first: int = 0) -> list[Term]:
        return self.balance.terms(routing, self._real(part), first) if self.balanced else []

    def _through_pipeline(self, parts: list[Batch], totals: dict[str, float], scale: float, metrics: Metrics) -> Tensor:
        pipeline, objective = self.cluster.pipeline, self.objective
        assert pipeline is not None and isinstance(objective, CausalLM)

        def score(model: Transformer, output: Output, part: Batch) -> Tensor:
            terms, found = objective.score(model, output, part)
            add_metrics(metrics, found)
            return step_loss(terms, totals) * scale

        def routing(notes: Sequence[Routing], part: Batch, first: int) -> Tensor | None:
            terms = self._balance(notes, part, first)
            return step_loss(terms, totals) * scale if terms else None

        def inputs(part: Batch) -> dict[str, Any]:
            return {"positions": part.positions, "mask": document_mask(part)}

        here = [part.to(self.cluster.device) for part in parts]
        return pipeline.step(here, inputs, score, routing=routing if self.balanced else None) / scale

    def _mine(self, part: Batch) -> Batch:
        context = self.cluster.context
        return part if context is None else context.cut(part)

    def _real(self, part: Batch) -> Tensor:
        """(rows, T of this rank) True where a token is no padding."""
        context = self.cluster.context
        return part.documents >= 0 if context is None else context.real(part)
