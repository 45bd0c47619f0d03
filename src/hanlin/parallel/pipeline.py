"""Pipeline parallelism: ranks hold consecutive layers, and micro-batches flow through them (GPipe, arXiv:1811.06965).

    rank 0   F0 F1 F2 F3 .. .. B0 .. B1 .. B2 .. B3        a rank sends hidden states to the next one
    rank 1      F0 B0 F1 B1 F2 B2 F3 B3                    and their gradients to the one before

    naive        one micro-batch goes through all stages before the next begins
    gpipe        all forwards, then all backwards
    1f1b         one forward, one backward: at most P micro-batches are under way         arXiv:2104.04473
    interleaved  1f1b over several stages a rank: a smaller bubble, more messages         arXiv:2104.04473, section 2.2
    zero_bubble  the weights' gradients fill the bubble: ZB-V with 2 stages a rank, with more ZB-H1 over stages that go
                 round and round                                                          arXiv:2401.10241

The order is that of `torch.distributed.pipelining`; shapes are given to it beforehand, so it asks for none.

Payload of a step with m micro-batches and hidden states of b s h numbers, P ranks with v stages each:

    naive, gpipe, 1f1b                 m b s h itemsize       at both ends of the pipeline, 2 m b s h itemsize between
    interleaved, zero_bubble (v > 2)   (2 v - 1) m b s h itemsize       at both ends, 2 v m b s h itemsize between
    zero_bubble, v = 2                 2 m b s h itemsize     at both ends (the last rank hands itself on), 4 between

`stages.sends` is the factor of m b s h itemsize. Besides, each rank gives one number to a sum, the loss; and the ranks
of the first and the last stage exchange the gradient of a tied embedding, once a step (in zero_bubble with v = 2 they
are one rank). torch keeps a buffer for every state that a rank receives in a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.models.transformer import Output, Transformer
from hanlin.nn.routing import Router, Routing
from hanlin.parallel.collectives import Group, place
from hanlin.parallel.settings import SEVERAL_STAGES, Schedule
from hanlin.parallel.stages import TABLE, Stage, cut_stages, is_tied, stages_a_rank

RunInputs = Callable[[Batch], dict[str, Any]]  # positions, mask, ... of `Transformer.forward`
Score = Callable[[Transformer, Output, Batch], Tensor]  # -> a share of the loss, a scalar; not averaged
Routed = Callable[[Sequence[Routing], Batch, int], Tensor | None]


class Pipeline:
    """One rank's place in a pipeline over `group`; every rank makes one of the same whole model, which is cut in place.

    chunks: stages a rank (interleaved, zero_bubble; None: 2). tokens: how many tokens of a row of so many a state
    between two layers holds here (fewer under sequence parallelism); None: all.

    What acts on a model afterwards acts as ever: recompute, `compute_dtype`, a context axis, plain replicas and ZeRO-1.
    """

    def __init__(
        self,
        model: Transformer,
        group: Group = None,
        *,
        schedule: Schedule = "1f1b",
        chunks: int | None = None,
        device: torch.device | None = None,
        tokens: Callable[[int], int] | None = None,
    ) -> None:
        self.rank, self.ranks = place(group)
        self.model, self.group, self.schedule = model, group, schedule
        self.chunks = stages_a_rank(schedule, chunks)
        self.device = device or model.device
        self._tokens = tokens or (lambda length: length)
        tied = is_tied(model)
        self.stages = cut_stages(model, self.rank, self.ranks, schedule, self.chunks)
        ends = {0, self.last_rank}
        self._table_is_apart = tied and len(ends) == 2
        self._shares_table = self._table_is_apart and self.rank in ends
        self._train: tuple[Any, list[_Place], Any] | None = None  # what the schedule was made for, and the schedule
        dist.barrier(group=group)  # nccl connects a group where all of it is; later some ranks talk to each other alone

    @property
    def last_rank(self) -> int:
        """The rank of the group that has the last stage, and so the loss."""
        return 0 if self.schedule == "zero_bubble" and self.chunks == 2 else self.ranks - 1

    @property
    def counted_elsewhere(self) -> set[str]:
        """Names of this rank whose gradient, summed, is another rank's, too: a global norm counts it there."""
        return {TABLE} if self._shares_table and self.rank else set()

    def step(self, parts: list[Batch], run_inputs: RunInputs, score: Score, *, routing: Routed | None = None) -> Tensor:
        """Forward and backward of all micro-batches -> the sum of their scores, a scalar, on every rank.

        parts: micro-batches of one shape, the same on all ranks of the pipeline. Gradients are added up in `.grad`, as
        if the scores were summed: nothing is divided by their number, so divide in `score` by the totals of the whole
        optimizer step. `Output.routing` in `score` is the last stage's.
        routing(notes, batch, first): every stage that has experts calls it with what their routers noted, the first of
        which is router `first` of this rank's. What it returns, if anything, joins the loss.
        `HanlinError` for micro-batches of several shapes, or too few of them for the schedule.
        """
        self._check(parts)
        if self.model._compiled_call_impl is not None:
            raise HanlinError(
                "A pipeline calls stages, never the model, so train.compile would be ignored. Leave it out."
            )
        if self._table_is_apart and any(parameter.grad is not None for parameter in self.model.parameters()):
            raise HanlinError(
                "The model has gradients already, and those of its tied embedding could not be told from this step's. "
                "Give all micro-batches of an optimizer step to one `step`, and empty the gradients before it."
            )
        wanted = (len(parts), self._state(parts[0]))
        if self._train is None or self._train[0] != wanted:
            self._train = None  # its buffers go first
            places = self._places(parts[0], train=True)
            self._train = (wanted, places, self._training_order(places, len(parts)))
        _, places, order = self._train
        work = Work(parts, run_inputs, score, routing)
        at_once = 1 if self.schedule == "naive" else len(parts)
        for start in range(0, len(parts), at_once):
            self._run(order, places, work, range(start, start + at_once))
        if self._shares_table:
            self._sum_table()
        return self._shared_sum(work)

    @torch.no_grad()
    def evaluate(self, parts: list[Batch], run_inputs: RunInputs, score: Score) -> Tensor:
        """The sum of the scores, a scalar, on every rank, without gradients. Any number of micro-batches; those of one
        shape that follow each other flow through the stages together."""
        work = Work(parts, run_inputs, score, None)
        start = 0
        for _, same in groupby(parts, key=self._state):
            count = len(list(same))
            places = self._places(parts[start], train=False)
            self._run(self._forward_order(places, count), places, work, range(start, start + count))
            start += count
        return self._shared_sum(work)

    @property
    def _table(self) -> Tensor:
        return self.model.model.embed_tokens.weight

    def _check(self, parts: list[Batch]) -> None:
        """Refuse what torch's schedules cannot order, or would pad."""
        shapes = list(dict.fromkeys(tuple(part.ids.shape) for part in parts))
        if len(shapes) != 1:
            raise HanlinError(
                f"A pipeline needs micro-batches of one shape, at least one; found {len(parts)} of the shapes {shapes} "
                "(rows, tokens). Choose a batch_size that micro_batch_size x data divides."
            )
        count, ranks = len(parts), self.ranks
        if self.schedule == "1f1b" and count < ranks:
            raise HanlinError(
                f"parallel.schedule 1f1b needs as many micro-batches as ranks; found {count} for {ranks} ranks. Take "
                "smaller micro-batches (micro_batch_size), or the schedule gpipe."
            )
        rounds = max(1, count // ranks)
        if self.schedule in SEVERAL_STAGES and self.last_rank and count % rounds:
            raise HanlinError(
                f"parallel.schedule {self.schedule} sends micro-batches in equal rounds of {ranks} ranks' worth; found "
                f"{count} micro-batches in {rounds} rounds. Take a multiple of {ranks} (micro_batch_size, batch_size)."
            )

    def _state(self, part: Batch) -> tuple[tuple[int, int, int], torch.dtype]:
        """Shape and dtype of the states between the stages."""
        rows, length = part.ids.shape
        return (rows, self._tokens(length), self.model.config.width), self.model.dtype

    def _places(self, part: Batch, *, train: bool) -> list["_Place"]:
        """This rank's stages as torch's schedules take them."""
        shape, dtype = self._state(part)
        state = torch.empty(shape, dtype=dtype, device="meta", requires_grad=train)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=self._loss_dtype, device="meta", requires_grad=train)
        places, routers = [], 0
        for stage in self.stages:
            found = _Place(
                _Runner(stage, routers), stage.index, stage.count, self.device,
                input_args=number if stage.first else state, output_args=loss if stage.last else state,
                group=self.group,
            )  # fmt: skip
            places.append(found)
            routers += sum(isinstance(module, Router) for module in stage.modules())
        return places

    def _training_order(self, places: list["_Place"], count: int) -> Any:
        """torch's schedule for `count` micro-batches."""
        keep: dict[str, Any] = {"loss_fn": lambda output, _: output, "scale_grads": False}
        if self.schedule == "naive":
            return ScheduleGPipe(places[0], 1, **keep)
        if self.schedule == "gpipe":
            return ScheduleGPipe(places[0], count, **keep)
        if self.schedule == "1f1b":
            return Schedule1F1B(places[0], count, **keep)
        if self.schedule == "interleaved":
            return ScheduleInterleaved1F1B(list(places), count, **keep)
        order = ScheduleZBVZeroBubble if self.chunks == 2 else ScheduleInterleavedZeroBubble
        return order(list(places), count, **keep)

    def _forward_order(self, places: list["_Place"], count: int) -> Any:
        """torch's schedule without a loss runs no backward."""
        if len(places) == 1:
            return ScheduleGPipe(places[0], count)
        order = ScheduleLoopedBFS if self.last_rank else ScheduleZBVZeroBubble
        return order(list(places), count)

    def _run(self, order: Any, places: list["_Place"], work: "Work", numbers: range) -> None:
        which = torch.tensor(list(numbers))
        runners = [stage.runner for stage in places]
        for runner in runners:
            runner.work = work
        try:
            order.step(which, which=which, target=which, return_outputs=False)
        except RuntimeError as error:
            if isinstance(error.__cause__, HanlinError):  # torch wraps what a stage raises
                raise error.__cause__ from None
            raise
        finally:
            for runner in runners:
                runner.work = None

    @torch.no_grad()
    def _sum_table(self) -> None:
        """The gradients of a tied embedding's two copies, summed into both: each rank sends its own to the other."""
        mine = self._table.grad
        if not self._table.requires_grad:
            return
        if mine is None:
            raise HanlinError(
                "The gradient of the tied embedding was taken away before the ranks of the first and the last stage "
                "could sum it. With a pipeline share the optimiser only: parallel.shard none or zero1."
            )
        theirs = torch.empty_like(mine, memory_format=torch.contiguous_format)
        other = self.last_rank if self.rank == 0 else 0
        exchange = [
            dist.P2POp(dist.isend, mine.contiguous(), group=self.group, group_peer=other),
            dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=other),
        ]
        for request in dist.batch_isend_irecv(exchange):
            request.wait()
        mine.add_(theirs)

    @property
    def _loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self.model.dtype, torch.float32)

    @torch.no_grad()
    def _shared_sum(self, work: "Work") -> Tensor:
        """What the stages scored: one number of each rank in a sum over the pipeline."""
        total = torch.zeros((), dtype=self._loss_dtype, device=self.device)
        if work.scores:
            total += torch.stack([score.to(total) for score in work.scores]).sum()
        dist.all_reduce(total, group=self.group)
        return total


@dataclass
class Work:
    """What the stages do in one step. scores: what this rank's added to the loss."""

    parts: list[Batch]
    run_inputs: RunInputs
    score: Score
    routing: Routed | None
    scores: list[Tensor] = field(default_factory=list)


class _Runner(nn.Module):
    """A stage as torch's schedules call it: with the number of a micro-batch. first_router: how many routers the
    earlier stages of this rank have."""

    def __init__(self, stage: Stage, first_router: int) -> None:
        super().__init__()
        self.stage, self.first_router = stage, first_router
        self.work: Work | None = None

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        stage, work = self.stage, self.work
        assert work is not None
        part, model = work.parts[int(which)], stage.model
        shared = model.share(part.ids, **work.run_inputs(part))
        x = stage(part.ids if stage.first else x, shared)
        if work.routing is not None and shared.routing:
            term = work.routing(tuple(shared.routing), part, self.first_router)
            if term is not None:
                work.scores.append(term.detach())
                x = _AddToLoss.apply(x, term) if torch.is_grad_enabled() else x
        if stage.last:
            loss = work.score(model, Output(None, x, tuple(shared.routing)), part)
            work.scores.append(loss.detach().clone())
            return loss
        if x._is_view():
            x = x.clone()  # torch lets go of the graph by detaching it in place, which a view refuses
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # frozen so far; the next stage sends a gradient all the same
        return x


class _Place(PipelineStage):
    """A stage whose shapes are all known, so that its first step sends nothing but states. torch would let all ranks
    vote on that first (2.13), or greet each other."""

    @property
    def runner(self) -> _Runner:
        assert isinstance(self.submod, _Runner)
        return self.submod

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []

    def get_local_bwd_output(self, mb_index: int) -> Any:  # torch asks without a backward, too
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class _AddToLoss(torch.autograd.Function):
    """x as it is; the backward pass that comes through it belongs to a loss that `term` was added to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:
        ctx.save_for_backward(term)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], torch.ones_like(ctx.saved_tensors[0])
