"""What happens to each row between the products: RMS norm, rotary turn, SwiGLU (`native/rows.cpp`).

Each is one pass over the data and one call of about 3 us, where a chain of torch operations takes 10–25. They return
None where the kernel cannot be used. fp32 inside, one rounding at the end.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hanlin.kernels.library import function


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor | None:
    """w * x / sqrt(mean(x^2) + eps): x (..., width), weight (width,) of x's dtype, or None for 1."""
    run = kernel("rms_norm", x)
    if run is None or (weight is not None and weight.dtype != x.dtype):
        return None
    width = x.shape[-1]
    if (groups := groups_of_rows(x, width)) is None:
        return None
    y = torch.empty_like(x)
    run(x.data_ptr(), *groups, width, None if weight is None else weight.data_ptr(), eps, y.data_ptr())
    return y


def rms_norm_twin(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal if weight is None else normal * weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """x (rows, T, heads, D); cos and signed sin (rows or 1, T, 1, R), R ≤ D even: pairs (i, i + R/2) of the first R
    numbers of a head turn, the others stay."""
    run = kernel("rotate", x)
    if run is None or cos.dtype != x.dtype:
        return None
    width, turned = x.shape[-1], cos.shape[-1]
    if (groups := groups_of_rows(x, width)) is None or not (cos.is_contiguous() and sin.is_contiguous()):
        return None
    y, period = torch.empty_like(x), cos.numel() // turned
    run(x.data_ptr(), *groups, width, cos.data_ptr(), sin.data_ptr(), turned, period, y.data_ptr())
    return y


def rotate_twin(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = cos.shape[-1]
    moving, still = x[..., :turned].float(), x[..., turned:]
    first, second = moving.chunk(2, -1)
    moving = moving * cos.float() + torch.cat([second, first], -1) * sin.float()
    return torch.cat([moving.to(x.dtype), still], -1)


def swiglu(gate_up: Tensor) -> Tensor | None:
    """silu(gate) * up: (..., 2 * hidden), gate first -> (..., hidden)."""
    run = kernel("swiglu", gate_up)
    if run is None or not gate_up.is_contiguous():
        return None
    both = gate_up.shape[-1]
    y = gate_up.new_empty((*gate_up.shape[:-1], both // 2))
    run(gate_up.data_ptr(), gate_up.numel() // both, both // 2, y.data_ptr())
    return y


def swiglu_twin(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def kernel(name: str, x: Tensor, *others: Tensor) -> Callable[..., None] | None:
    """None for what has no address: other devices, subclasses (sharded, fake), a graph being traced; and where the
    others are not like x. A planner's fake tensors bring what stands for the kernel (`plan.fake`)."""
    if torch.compiler.is_compiling() or not x.is_cpu or not all(map(addressed, (x, *others))):
        return None
    if any(other.dtype != x.dtype for other in others):
        return None
    planned = _planned(x)
    return function(name, x.dtype) if planned is None else planned(name, x)


def addressed(x: Tensor) -> bool:
    """Whether its numbers lie at one address, or it stands for such a tensor in a plan."""
    return type(x) is Tensor or _planned(x) is not None


def _planned(x: Tensor) -> Callable[..., Callable[..., None] | None] | None:
    return getattr(getattr(x, "fake_mode", None), "planned_kernel", None)


def groups_of_rows(x: Tensor, width: int) -> tuple[int, int, int] | None:
    """(outer, inner, stride): x as `outer` groups, `stride` apart, of `inner` rows behind each other; None if it isn't.

    A four-dimensional x keeps its first two dimensions as groups: they are its tokens. `empty_like` makes either of
    them contiguous, in half the time of `empty`.
    """
    if x.dim() == 4:
        rows, length, inner, _ = x.shape
        first, second, third, last = x.stride()
        if last == 1 and (third == width or inner == 1) and (rows == 1 or length == 1 or first == length * second):
            return rows * length, inner, (first if length == 1 else second)
        return None
    if not x.is_contiguous():
        return None
    return (x.numel() // width if width else 0), 1, width
