"""ZeRO: the replicas share what plain data parallelism holds once a rank (arXiv:1910.02054).

    stage 1   optimiser   gradients are whole; in the last backward each rank gets the sum of its share
    stage 2   + gradients every backward's gradients leave at once, unit by unit; only the sum of the share stays
    stage 3   + weights   a unit is whole only while it runs, forward and backward; the next one is gathered meanwhile

A unit is a layer; what is left (embeddings, last norm, head, layers that look ahead) is one more, the rest. A unit has
one flat buffer for each dtype, trainable and frozen apart, padded to a multiple of the N ranks. An optimiser steps on
flat pieces of the parameters, in the parameters' dtype.

Sent a step by every rank, with M micro-batches, in numbers; P(u): trainable numbers of unit u, F(u): frozen ones, each
padded buffer by buffer to a multiple of N:

    stage 1   reduce-scatter      sum P        all-gather  sum P
    stage 2   reduce-scatter  M * sum P        all-gather  sum P
    stage 3   reduce-scatter  M * sum P        all-gather  P(rest) + F(rest) + 2 M * sum over layers (P + F)

A reduce-scatter counts its input, an all-gather its output, each times the itemsize of its buffer; one call a buffer
and time. A layer whose output needs no gradient (frozen, over frozen ones) is not gathered again for the backward:
M instead of 2 M. Recomputed layers (`train.recompute`) cost no further gather. Stages 1 and 2 leave frozen parameters
alone. A unit that no backward of the step reaches is reduced once. Where a schedule makes the gradients of weights
apart from backward (zero bubble), stage 2 cannot take them away as they come, and reduces once in `finish`.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from hanlin.core.errors import HanlinError
from hanlin.nn.relative_attention import RelativeAttention
from hanlin.parallel.flat import InOrder, Named, Place
from hanlin.parallel.shares import Share
from hanlin.parallel.units import Unit, share_out

OUTSTANDING = 2  # reduce-scatters under way at a time: one overlaps with compute, each holds a unit's gradients


class Zero:
    """The `Replication` of stage 1, 2 or 3.

    model: in whose layers it hangs; named: the parameters to share, by their names in `model` (a subset, where experts
    have replicas of their own); group: the replicas. All of them hold the same values. Afterwards the parameters must
    not be moved or cast. Stage 3 leaves no parameter whole outside `begin` … `finish` and `whole()`.
    """

    def __init__(self, model: nn.Module, named: Named, group: dist.ProcessGroup | None, stage: int) -> None:
        _refuse(model, named, group, stage)
        assert group is not None
        self.stage, self._group = stage, group
        self._units = share_out(model, named, group, stage)
        self._shares = [share for unit in self._units for share in unit.shares]
        self._layers = [unit for unit in self._units if unit.module is not None]
        self._rest = [unit for unit in self._units if unit.module is None]
        # backward reaches the last layer first; the rest is complete last, with the embedding
        order = [*reversed(self._layers), *self._rest]
        self._trained = [share for unit in order for share in unit.shares if share.flat.trainable]
        self._order = InOrder([share.flat for share in self._trained], lambda number: self._reduce([number]))
        self._under_way: list[Share] = []
        self._live = False  # inside `last()`
        self._watching = False  # whether the end of the backward that runs will be noticed
        self._held = 0  # how many `whole()` are open
        self._bypassed = any(isinstance(module, RelativeAttention) for module in model.modules())
        self._handles: list[Any] = []
        self._hang(model)
        for unit in self._units:
            self._free(unit)

    @property
    def pieces(self) -> dict[str, nn.Parameter]:
        """This rank's flat share of each trainable parameter."""
        return {name: piece for share in self._shares for name, piece in share.pieces.items()}

    @property
    def held(self) -> dict[str, Tensor]:
        """The pieces, and those of frozen parameters that the ranks share (stage 3)."""
        frozen = {name: piece for share in self._shares for name, piece in share.frozen.items()}
        return frozen | {name: piece.detach() for name, piece in self.pieces.items()}

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        return {name: found for share in self._shares for name, found in share.ranges.items()}

    # --- a step ---

    def begin(self) -> None:
        """Gradients become empty; what runs first is made whole."""
        if not all(share.intact for share in self._shares):
            raise HanlinError(
                "Parameters were moved or cast after ZeRO had laid them into its buffers. Bring the model to its "
                "device and dtype first, then make `Zero`."
            )
        self._watching = False
        self._under_way.clear()
        self._order.reset()
        for unit in self._units:
            unit.waiting, unit.backward = 0, False
            for share in unit.shares:
                share.clear()
        if self.stage == 3:
            for unit in [*self._rest, *self._layers[:1]]:
                self._start(unit)
        for unit in self._units if self._bypassed else self._rest:
            self._wait(unit)

    @contextmanager
    def last(self) -> Generator[None]:
        """Stage 1: inside, the gradients of a unit leave when they are there (one backward only). The others always
        work that way."""
        self._live = True
        try:
            yield
        finally:
            self._live = False

    def finish(self) -> None:
        if self.stage == 1:
            self._order.flush()
        else:  # gradients that were written without a backward through hooks
            self._reduce([n for n, share in enumerate(self._trained) if share.waiting or not share.reduced])
        self._under_way.clear()
        for share in self._trained:
            share.hand_over()
        for unit in self._units:
            self._free(unit)

    def publish(self) -> None:
        """Stages 1 and 2 begin to gather all weights in the order of the forward pass; each unit waits for its own.
        Stage 3 gathers what it needs when it needs it."""
        if self.stage < 3:
            for unit in [*self._rest, *self._layers]:
                self._wait(unit)
                self._start(unit)

    @contextmanager
    def whole(self) -> Generator[None]:
        for unit in self._units:
            if self.stage == 3:
                self._start(unit)
            self._wait(unit)
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            for unit in self._units:
                for share in unit.shares:
                    share.take_over()
                self._free(unit)

    def close(self) -> None:
        """The parameters stay views of whole buffers; the pieces mean nothing any more."""
        for unit in self._units:
            if self.stage == 3:
                self._start(unit)
            self._wait(unit)
        self._held += 1
        for share in self._shares:
            share.clear()
        for handle in self._handles:
            handle.remove()

    # --- hooks ---

    def _hang(self, model: nn.Module) -> None:
        keep = self._handles.append
        for number, share in enumerate(self._trained):
            unit = next(unit for unit in self._units if share in unit.shares)
            for place in share.flat.places:
                hook = partial(self._arrived, number, unit, place)
                keep(place.parameter.register_post_accumulate_grad_hook(hook))
        if self._rest:
            keep(model.register_forward_pre_hook(_uncompiled(self._before_model)))
        for place, unit in enumerate(self._layers):
            assert unit.module is not None
            following = self._layers[place + 1] if place + 1 < len(self._layers) else None
            before = self._layers[place - 1] if place else None
            keep(unit.module.register_forward_pre_hook(_uncompiled(partial(self._before_forward, unit, following))))
            if self.stage > 1:
                keep(unit.module.register_forward_hook(_uncompiled(partial(self._after_forward, unit, before))))
        if self.stage == 3:
            owned = {id(place.parameter) for share in self._shares for place in share.flat.places}
            for module in model.modules():
                if any(id(p) in owned for p in module.parameters(recurse=False)):
                    keep(module.register_state_dict_pre_hook(self._refuse_state))
                    keep(module.register_load_state_dict_pre_hook(self._refuse_state))

    def _before_model(self, *_: Any) -> None:
        for unit in self._rest:
            if self.stage == 3:
                self._start(unit)
            self._wait(unit)

    def _before_forward(self, unit: Unit, following: Unit | None, _: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if self.stage == 3:
            self._start(unit)
            self._wait(unit)
            if following is not None and not _in_backward():
                self._start(following)
        else:
            self._wait(unit)
        if self.stage == 1 or not torch.is_grad_enabled() or _in_backward():
            return None
        tensors = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        if not tensors:
            return None  # the end of the backward closes the unit
        marked = iter(_Mark.apply(partial(self._leave, unit), *tensors))
        return tuple(next(marked) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)

    def _after_forward(self, unit: Unit, before: Unit | None, _: nn.Module, __: Any, out: Any) -> None:
        if unit.backward:
            return  # its backward runs it again, and needs it further
        self._free(unit)
        if torch.is_grad_enabled() and not _in_backward():
            outs = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor) and x.requires_grad]
            for x in outs:
                x.register_hook(lambda _: self._enter(unit, before))
            unit.waiting += bool(outs)

    def _enter(self, unit: Unit, before: Unit | None) -> None:
        """The gradient of a layer's output is there: its backward begins."""
        if unit.backward:
            return
        self._watch()
        assert unit.module is not None
        unit.backward, unit.waiting = True, unit.waiting - 1
        unit.wanted = _makes_gradients(unit.module)
        if self.stage == 3:
            if not (unit.wanted or self._held) and any(p.requires_grad for p in unit.module.parameters()):
                raise HanlinError(
                    "zero3 gives a layer's weights back after its backward, and this backward leaves the gradients of "
                    "weights for later, as the schedule zero_bubble does. Take zero1, or another schedule."
                )
            self._start(unit)
            self._wait(unit)
            if before is not None and before.waiting > 0:
                self._start(before)

    def _leave(self, unit: Unit) -> None:
        """The gradient of its input is there: its backward is over."""
        if unit.backward:
            unit.backward = False
            self._free(unit)
            if unit.wanted:
                self._reduce_unit(unit)

    def _arrived(self, number: int, unit: Unit, place: Place, _: Any) -> None:
        """A parameter's gradient of this backward is there."""
        share = self._trained[number]
        if self.stage == 1 and self._order.started(number):
            raise HanlinError(
                f"A second gradient of {place.name} came after the first had left: inside `last()` there can be one "
                "backward only, the last of the step. Run the others before it."
            )
        share.gradients.take(place)
        if self.stage > 1:
            self._watch()
        elif self._live:
            self._order.arrived(number)

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        """All gradients of this backward are there."""
        self._watching = False
        for unit in [*reversed(self._layers), *self._rest]:
            self._leave(unit)
            if any(not share.gradients.empty for share in unit.shares):  # of the rest, or of what goes past its layer
                self._reduce_unit(unit)

    def _refuse_state(self, *_: Any) -> None:
        if not self._held:
            raise HanlinError(
                "Under zero3 the weights of this model are spread over the ranks, and it has no state of its own. Read "
                "or load them inside `whole()`."
            )

    # --- units ---

    def _start(self, unit: Unit) -> None:
        for share in unit.shares:
            share.start_gathering()

    def _wait(self, unit: Unit) -> None:
        for share in unit.shares:
            share.wait()

    def _free(self, unit: Unit) -> None:
        if not self._held:
            for share in unit.shares:
                share.give_back()

    def _reduce_unit(self, unit: Unit) -> None:
        self._reduce([number for number, share in enumerate(self._trained) if share in unit.shares])

    def _reduce(self, numbers: list[int]) -> None:
        """Begin the reduce-scatters of these buffers; of all that were begun, at most `OUTSTANDING` stay under way."""
        for number in numbers:
            share = self._trained[number]
            share.start_reducing()
            self._under_way.append(share)
            if len(self._under_way) > OUTSTANDING:
                self._under_way.pop(0).settle()


class _Mark(torch.autograd.Function):
    """Values as they are; calls `passed` when their gradients pass."""

    @staticmethod
    def forward(ctx: Any, passed: Callable[[], None], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.passed = passed
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.passed()
        return None, *gradients


def _refuse(model: nn.Module, named: Named, group: Any, stage: int) -> None:
    if stage not in (1, 2, 3):
        raise HanlinError(f"ZeRO has the stages 1, 2 and 3, found {stage}.")
    if group is None:
        raise HanlinError(
            "ZeRO shares parameters among several replicas, and this process is alone: use `DataParallel`."
        )
    half = [name for name, p in named.items() if p.requires_grad and p.dtype not in (torch.float32, torch.float64)]
    if half:
        raise HanlinError(
            f"ZeRO steps on trainable parameters in their own dtype, and {half[0]} is {named[half[0]].dtype}: small "
            "updates would be lost. Cast the trainable parameters to fp32 first (`train.precision.widen_weights`)."
        )
    if stage == 3 and any(isinstance(module, RelativeAttention) for module in model.modules()):
        raise HanlinError(
            "zero3 gathers a layer when it is called, and relative attention with two streams (XLNet) goes past its "
            "layers. Use zero2."
        )


def _makes_gradients(module: nn.Module) -> bool:
    """Whether the backward that runs fills the `.grad` of a layer's weights: one that only passes through to its inputs
    does not, and `torch.autograd.grad` never does. The same on all ranks, whatever each of them used."""
    nodes = [get_gradient_edge(p).node for p in module.parameters() if p.requires_grad]
    try:
        return any(torch._C._will_engine_execute_node(node) for node in nodes)
    except RuntimeError:  # torch does not say it of a leaf that `torch.autograd.grad` was asked for
        return False


def _in_backward() -> bool:
    """Whether this is called from inside a backward: then a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(hook)
