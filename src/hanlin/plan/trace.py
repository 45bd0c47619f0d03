"""What a step does, as countable work: each operation of a fake run becomes a kind, a dtype and a size.

    products       kind "mm nt" (how the two matrices lie in memory), size (m, k, n): 2 m k n FLOPs each
    attention      Hanlin's kernels and torch's: kind "attention", size (pairs of query and key, width)
    passes         kind "copy", "pointwise", …: size (bytes read and written,)

Equal work is counted together, so a step of a hundred layers is a few hundred lines.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from hanlin.kernels.train_attention import Shape
from hanlin.models.config import ModelConfig
from hanlin.plan.segments import Planned, own_state
from hanlin.plan.work import Work

_OPERATIONS = {  # kind of pass -> operations (without overload); what is not here is "pointwise"
    "fill": "zeros zeros_like new_zeros fill_ zero_ ones ones_like full full_like",
    "copy": "clone copy_ _to_copy cat stack repeat_interleave",
    "transcendental": "exp exp_ log cos sin sigmoid sigmoid_backward silu silu_backward gelu gelu_backward tanh tanh_ "
    "tanh_backward native_dropout bernoulli_ uniform_",
    "softmax": "_softmax _softmax_backward_data _log_softmax logsumexp native_layer_norm native_layer_norm_backward",
    "reduce": "sum mean amax max min any all aminmax linalg_vector_norm _foreach_norm",
    "gather": "embedding embedding_dense_backward index index_select gather index_put_ index_copy_ index_add_ scatter_ "
    "scatter_add_ _embedding_bag _embedding_bag_forward_only",
    "sort": "sort topk searchsorted cumsum",
    "adam": "_fused_adamw_",
}
KINDS = {operation: kind for kind, names in _OPERATIONS.items() for operation in names.split()}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "lift_fresh",
        "_unsafe_view", "detach"}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"}

Key = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Trace:
    """The work of one step. counts: how often each (kind, dtype, size) is done; calls: operations of any kind."""

    counts: dict[Key, int]
    calls: int

    @property
    def flops(self) -> float:
        """Of all products, 2 m k n each, and of attention."""
        return sum(count * key_flops(key) for key, count in self.counts.items())


class Recorder:
    """A listener of `plan.fake.Fakes` that counts."""

    def __init__(self) -> None:
        self.counts: Counter[Key] = Counter()
        self.calls = 0

    def __call__(self, name: str, inputs: tuple[Any, ...], out: Any) -> None:
        if name.startswith("prim."):
            return
        self.calls += 1
        if name.startswith("hanlin."):
            key = _kernel(name.removeprefix("hanlin."), *inputs)
            self.counts[key] += 1
            return
        args, kwargs = inputs
        base = name.split(".")[1]
        if base in FREE or _is_view(name):
            return
        if base in PRODUCTS:
            for key, count in _product(base, args, kwargs):
                self.counts[key] += count
                if base == "_grouped_mm":
                    self.counts[f"new {key[0]}", key[1], (0,)] += count
        elif "scaled_dot_product" in base:
            self.counts[_torch_attention(base, args)] += 1
        else:
            self.counts[_pass(base, args, kwargs, out)] += 1


def trace_step(config: ModelConfig, work: Work) -> Trace:
    """The second optimizer step of this work, counted."""
    recorder = Recorder()
    with Planned(config, work, "cpu", listener=recorder) as (fakes, bench):
        bench.step(fakes.stage)
        own_state(fakes.ledger, bench)
        recorder.counts.clear()
        recorder.calls = 0
        bench.step(fakes.stage)
    return Trace(dict(recorder.counts), recorder.calls)


def key_flops(key: Key) -> float:
    """FLOPs of one such operation; 0 for passes."""
    kind, _, size = key
    if kind.startswith("mm"):
        return 2.0 * math.prod(size)
    if kind.startswith("attention"):
        return (10.0 if kind.endswith("back") else 4.0) * math.prod(size)
    return 0.0


def _product(base: str, args: Any, kwargs: Any) -> list[tuple[Key, int]]:
    a, b = args[1:3] if base in ("addmm", "baddbmm") else args[:2]
    dtype = _dtype(a)
    kind = "mm " + "".join("t" if x.stride(-1) != 1 and x.shape[-1] > 1 else "n" for x in (a, b))
    if base != "_grouped_mm":
        batch = a.shape[0] if a.dim() == 3 else 1
        return [((kind, dtype, (a.shape[-2], a.shape[-1], b.shape[-1])), batch)]
    if b.dim() == 3:  # rows of each group by its matrix
        groups = b.shape[0]
        return [((kind, dtype, (max(1, a.shape[0] // groups), a.shape[1], b.shape[2])), groups)]
    groups = len(kwargs.get("offs") if kwargs.get("offs") is not None else args[2])
    return [((kind, dtype, (a.shape[0], max(1, a.shape[1] // groups), b.shape[1])), groups)]


def _kernel(name: str, x: Tensor, numbers: tuple[Any, ...]) -> Key:
    if name.startswith("train_attention"):
        shape = Shape.from_address(numbers[0])
        pairs = shape.rows * shape.heads * shape.length * (shape.length + 1 if shape.causal else 2 * shape.length) // 2
        back = " back" if name.endswith("backward") else ""
        return f"attention{back}", _dtype(x), (pairs, (shape.width + shape.value_width) // 2)
    return name, _dtype(x), (x.numel() * x.element_size(),)


def _torch_attention(base: str, args: Any) -> Key:
    back = "backward" in base
    q, k = (args[1], args[2]) if back else (args[0], args[1])
    rows, heads, length, width = q.shape
    return f"attention torch{' back' if back else ''}", _dtype(q), (rows * heads * length * k.shape[2], width)


def _pass(base: str, args: Any, kwargs: Any, out: Any) -> Key:
    kind = KINDS.get(base, KINDS.get(base.removeprefix("_foreach_").rstrip("_"), "pointwise"))
    read = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
    size = sum(map(_bytes, read)) + sum(map(_bytes, made))
    if kind == "gather" and made:  # of a table only what is looked at
        small = sum(_bytes(x) for x in read if x is not args[0])
        size = 2 * sum(map(_bytes, made)) + small
    if (base.startswith("_foreach") and base.endswith("_")) or base == "_fused_adamw_":
        first = [x for x in args[0] if isinstance(x, Tensor)]
        size = sum(map(_bytes, read)) + sum(map(_bytes, first))
    dtype = _dtype(made[0] if made else read[0] if read else None)
    return kind, dtype, (size,)


def _bytes(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _dtype(x: Tensor | None) -> str:
    if x is None:
        return "fp32"
    known = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16", torch.bool: "bool"}
    return known.get(x.dtype, "fp32")


def _is_view(name: str) -> bool:
    namespace, base, overload = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), base)
    schema = getattr(packet, overload)._schema
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
