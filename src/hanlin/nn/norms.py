"""Root-mean-square layer normalisation (arXiv:1910.07467): y = w * x / sqrt(mean(x^2) + eps)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Statistics in fp32 in any precision; the output has the dtype of the input. weight (width,)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., width), weight (width,) -> like x. One hand-written backward instead of a chain of elementwise ops."""
    if not torch.is_grad_enabled():  # autograd.Function costs 4 us a call, which one token of a small model feels
        if weight.dtype == x.dtype:
            return torch.rms_norm(x, weight.shape, weight, eps)  # the same numbers, 1.5 us less
        return _normalise(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))  # (..., 1)
    return (wide * inverse).mul_(weight).to(x.dtype), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = gradients[0].to(inverse.dtype)
        normal = x.to(inverse.dtype) * inverse
        grad_weight = (grad * normal).reshape(-1, len(weight)).sum(0) if ctx.needs_input_grad[1] else None
        inner = grad * weight
        slope = (inner * normal).mean(-1, keepdim=True)
        grad_x = inner.addcmul_(normal, slope, value=-1).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None
