"""A training step without memory: the real model's code on fake tensors, and a ledger of the bytes it would hold.

    with Fakes() as fakes:                     tensors of weights and activations have a shape and no numbers
        bench = open_bench(config, work, cpu)
        bench.step(fakes.stage)
    fakes.ledger.peak

Numbers that *decide* (ids, targets, positions, documents, and all that is made of them: integers and truth values) are
real, so code that looks at them works; numbers that *weigh* are fake. Where a weighing number is looked at (a loss, a
norm), it is 2: finite, and above the usual clipping limit, so that clipping runs.

Hanlin's CPU kernels are called by address, which fake tensors have not; `Fakes.planned_kernel` stands in their place
(`kernels.rows.kernel`), so a plan follows the same way through the code as the run.
"""

import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hanlin.core.errors import HanlinError
from hanlin.kernels.library import function
from hanlin.models.config import ModelConfig
from hanlin.nn.rope import Rope
from hanlin.plan.fused_attention import fused_attention
from hanlin.plan.ledger import Ledger
from hanlin.plan.workspace import hidden_bytes

aten = torch.ops.aten
UNKNOWN = 2.0  # a number that nobody knows
SMALL_REAL = 1 << 10  # floating numbers that may be real
LARGEST_REAL = 1 << 28  # numbers in a tensor that is really made
Listener = Callable[[str, tuple[Any, ...], Any], None]  # (name of the operation, its inputs, its output)


class Fakes(TorchDispatchMode):
    """Within it new tensors of floating numbers are fake. device: "cpu" or "cuda", what they stand for.

    listener: told of every operation, kernels of Hanlin included (`plan.seconds`).
    """

    def __init__(self, device: str = "cpu", listener: Listener | None = None) -> None:
        super().__init__()
        self.device, self.listener = device, listener
        self.ledger = Ledger(granule=512 if device == "cuda" else 1)
        self.fake = _Mode(self)
        self._around = ExitStack()

    def __enter__(self) -> "Fakes":
        self._around.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        if self.device == "cuda":
            self._around.enter_context(fused_attention())
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._around.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _looked_at(args[0])
        if func in (aten.index.Tensor, aten.index_put_.default):
            args = (args[0], _as_numbers(args[1]), *args[2:])
        out = self._run(func, args, kwargs)
        self.ledger.note(out, func, args)
        extra = hidden_bytes(func, args, kwargs, out) if self.device == "cpu" else 0
        if extra:
            self.ledger.moment(extra)
        if self.listener is not None:
            self.listener(str(func), (args, kwargs), out)
        return out

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """What is made inside belongs to this part of the step (`plan.work.Stage`)."""
        before, self.ledger.stage = self.ledger.stage, name
        try:
            yield
        finally:
            self.ledger.stage = before

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._grouped_mm.default:
            return _grouped(*args, **kwargs)
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **kwargs)
        if tensors and all(x.is_floating_point() and x.numel() <= SMALL_REAL for x in tensors):
            return func(*args, **kwargs)  # written down in the code: a table of codes, rotary frequencies
        if any(x.is_floating_point() for x in tensors):
            with self.fake:
                return func(*args, **kwargs)
        try:
            with self.fake:
                out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):  # asks for the values, which are there
            return func(*args, **kwargs)
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        if any(x.is_floating_point() or x.numel() > LARGEST_REAL for x in made):
            return out
        return func(*args, **kwargs)


class _Mode(FakeTensorMode):
    """Makes the fake tensors; each knows its mode, and so what it stands for."""

    def __init__(self, fakes: Fakes) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.fakes = fakes

    def planned_kernel(self, name: str, x: Tensor) -> Callable[..., None] | None:
        """What is called with the addresses and numbers that the kernel would get; None where there is no kernel."""
        if self.fakes.device != "cpu" or function(name, x.dtype) is None:
            return None
        listener = self.fakes.listener

        def nothing(*numbers: Any) -> None:
            if listener is not None:
                listener(f"hanlin.{name}", (x, numbers), None)

        return nothing


def warm_tables(config: ModelConfig) -> None:
    """Rotary frequencies are kept between passes; what is kept must be real, so it is made before the fakes."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    for layer in config.layers:
        attention = layer.attention
        if isinstance(attention.position, Rope):
            width = getattr(attention, "rope_dim", None) or getattr(attention, "head_dim", 0)
            attention.position.tables(one, width, torch.float32, longest=config.max_positions)


def _looked_at(x: FakeTensor) -> Any:
    if x.constant is not None:
        return x.constant.item()
    if x.dtype == torch.bool:
        return True
    return UNKNOWN if x.is_floating_point() else int(UNKNOWN)


def _as_numbers(indices: Any) -> Any:
    """Truth values as the places that are true: how many they are decides a shape, so the real ones are asked."""
    if len(indices) == 1 and isinstance(indices[0], Tensor) and indices[0].dtype == torch.bool:
        if isinstance(indices[0], FakeTensor):
            raise HanlinError(
                "A plan cannot follow this model: a computed truth value decides how many rows there are."
            )
        return list(indices[0].nonzero().unbind(1))
    return indices


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
    """The shape of a grouped product in any dtype (torch's own description of it knows bf16 only)."""
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])
