"""The passes between the products of a training step, forward and backward (`native/training.cpp`).

The products of a small model are so fast on a CPU with matrix units that SwiGLU, norms and turns take longer, because
each torch operation among them goes through memory once more. Here each is one pass. They return None where the kernel
cannot be used. fp32 inside, one rounding at the end; sums over rows are made block by block, in an order that does not
depend on the number of threads.
"""

import torch
from torch import Tensor

from hanlin.kernels.rows import addressed, groups_of_rows, kernel


def swiglu(gate_up: Tensor) -> Tensor | None:
    """silu(gate) * up: (..., 2 * hidden), gate first -> (..., hidden)."""
    run = kernel("train_swiglu", gate_up)
    if run is None or not gate_up.is_contiguous():
        return None
    both = gate_up.shape[-1]
    y = gate_up.new_empty((*gate_up.shape[:-1], both // 2))
    run(gate_up.data_ptr(), gate_up.numel() // max(both, 1), both // 2, y.data_ptr())
    return y


def swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor | None:
    """The gradient of `swiglu`: gate_up (..., 2 * hidden), grad (..., hidden) -> like gate_up."""
    run = kernel("train_swiglu_backward", gate_up, grad)
    if run is None or not gate_up.is_contiguous():
        return None
    grad, out, both = grad.contiguous(), torch.empty_like(gate_up), gate_up.shape[-1]
    run(gate_up.data_ptr(), grad.data_ptr(), gate_up.numel() // max(both, 1), both // 2, out.data_ptr())
    return out


def swiglu_backward_twin(gate_up: Tensor, grad: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    s, d = torch.sigmoid(gate), grad.float()
    return torch.cat([d * up * s * (1 + gate * (1 - s)), d * gate * s], -1).to(gate_up.dtype)


def norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor] | None:
    """w * x / sqrt(mean(x^2) + eps) and 1 / that root: x (..., width), weight (width,) of any dtype, or None for 1 ->
    like x, fp32 (..., 1)."""
    run = kernel("train_norm", x)
    if run is None or (weight is not None and not addressed(weight.data)):
        return None
    width = x.shape[-1]
    if (groups := groups_of_rows(x, width)) is None:
        return None
    y = x.new_empty(x.shape)
    inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    scale = None if weight is None else weight.detach().float().contiguous()
    run(
        x.data_ptr(), *groups, width, None if scale is None else scale.data_ptr(), eps, y.data_ptr(), inverse.data_ptr()
    )
    return y, inverse


def norm_backward(
    x: Tensor, weight: Tensor | None, inverse: Tensor, grad: Tensor, *, of_weight: bool
) -> tuple[Tensor, Tensor | None] | None:
    """The gradients of x and of the weight (fp32, where it is wanted); inverse: as `norm` gave it."""
    run = kernel("train_norm_backward", x, grad)
    width = x.shape[-1]
    if run is None or (groups := groups_of_rows(x, width)) is None:
        return None
    grad, grad_x = grad.contiguous(), x.new_empty(x.shape)
    scale = None if weight is None else weight.detach().float().contiguous()
    grad_weight = x.new_empty(width, dtype=torch.float32) if of_weight else None
    run(
        x.data_ptr(), *groups, width, grad.data_ptr(), None if scale is None else scale.data_ptr(), inverse.data_ptr(),
        grad_x.data_ptr(), None if grad_weight is None else grad_weight.data_ptr(),
    )  # fmt: skip
    return grad_x, grad_weight


def norm_backward_twin(x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    normal, d = x.float() * inverse, grad.float()
    inner = d * weight.float()
    grad_x = (inner - normal * (inner * normal).mean(-1, keepdim=True)) * inverse
    return grad_x.to(x.dtype), (d * normal).flatten(0, -2).sum(0)


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor | None:
    """`rows.rotate` by torch's threads; sign -1: back."""
    run = kernel("train_turn", x, cos)
    if run is None:
        return None
    width, turned = x.shape[-1], cos.shape[-1]
    if (groups := groups_of_rows(x, width)) is None or not (cos.is_contiguous() and sin.is_contiguous()):
        return None
    y, period = x.new_empty(x.shape), cos.numel() // turned
    run(x.data_ptr(), *groups, width, cos.data_ptr(), sin.data_ptr(), turned, period, sign, y.data_ptr())
    return y


def widen(low: Tensor, into: Tensor, *, add: bool) -> bool:
    """into += low, or into = low, where `into` is fp32 and as large; False, and nothing done, where that cannot be."""
    run = kernel("train_widen", low)
    if run is None or into.dtype != torch.float32 or not (low.is_contiguous() and into.is_contiguous()):
        return False
    run(low.data_ptr(), low.numel(), int(add), into.data_ptr())
    return True
