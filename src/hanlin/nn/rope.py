"""Rotary position embedding (RoFormer, arXiv:2104.09864), in the half-split layout of the Hugging Face Llama weights.

Pair i of a head is (x_i, x_{i + D/2}) and turns by the angle `position * theta^(-2i/D)`. Angles stay fp32 in any
precision: at position 4,096 bf16 cannot tell neighbours apart.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta^(-2i/D) for i < D/2, fp32, (head_dim / 2,)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponent


def rope_tables(positions: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (rows or 1, T) integers, inverse (D/2,) -> cos and signed sin, both (rows or 1, T, 1, D) in `dtype`.

    The sine's first half carries the minus sign of the rotation, so a turn is `x * cos + swap_halves(x) * sin`.
    """
    angles = (positions.to(torch.float32)[..., None] * inverse)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (rows, T, heads, D) turned by its tables (rows or 1, T, 1, D). Backward turns by the negative angle.

    Whole rows of D at a time: writing the two halves apart is three times slower in bf16 (the inner loop is D/2 long).
    """
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin, 1.0)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat([second, first], -1), sin, value=sign)
