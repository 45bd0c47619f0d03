"""Normalisation over the width of a token. `build_norm` makes any norm, those over rows and tokens too, from its kind.

    RMS     w x / sqrt(mean(x^2) + eps)                              arXiv:1910.07467
    Layer   w (x - mean(x)) / sqrt(var(x) + eps) + b                 arXiv:1607.06450
    Deep    LayerNorm(alpha x + f(x)), f initialised with beta       arXiv:2203.00555: a residual, not a norm

Statistics are fp32 in any precision (fp64 for fp64); the output has the dtype of the input.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hanlin.core.errors import HanlinError
from hanlin.kernels import rows, training
from hanlin.nn.batch_norms import BatchNorm, GroupNorm, InstanceNorm
from hanlin.nn.wide import wide

Kind = Literal["rms", "layer", "batch", "group", "instance"]


def build_norm(
    kind: Kind, width: int, eps: float, *, bias: bool = True, unit_offset: bool = False, groups: int | None = None
) -> nn.Module:
    """A norm over (rows, T, width). bias: of the norms that can have one (RMS cannot); unit_offset: of `RMSNorm`;
    groups: of `GroupNorm`, which needs it. "batch", "group" and "instance" mix tokens: never in a causal model."""
    if unit_offset and kind != "rms":
        raise HanlinError(f"`unit_offset` belongs to the norm 'rms'; this one is {kind!r}.")
    if (groups is not None) != (kind == "group"):
        raise HanlinError(f"`groups` belongs to the norm 'group', which needs it; found {groups} for {kind!r}.")
    if kind == "rms":
        return RMSNorm(width, eps, unit_offset=unit_offset)
    if kind == "layer":
        return LayerNorm(width, eps, bias=bias)
    if kind == "batch":
        return BatchNorm(width, eps, bias=bias)
    if groups is not None:
        return GroupNorm(groups, width, eps, bias=bias)
    if kind == "instance":
        return InstanceNorm(width, eps, bias=bias)
    raise HanlinError(f"There is no norm {kind!r}. Known are: rms, layer, batch, group, instance.")


class RMSNorm(nn.Module):
    """weight (width,), starting at 1.

    unit_offset: the weight is stored as what it differs from 1 and starts at 0; 1 + w and the product are fp32 (Gemma).
    weight=False: none at all, x / rms(x) (Llama 4's norm of queries and keys).
    """

    def __init__(self, width: int, eps: float = 1e-6, *, weight: bool = True, unit_offset: bool = False) -> None:
        super().__init__()
        if unit_offset and not weight:
            raise HanlinError("`unit_offset` says how a weight is stored; this norm has `weight=False`.")
        self.width, self.eps, self.unit_offset = width, eps, unit_offset
        self.weight = nn.Parameter(torch.full((width,), 0.0 if unit_offset else 1.0)) if weight else None

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        if self.unit_offset and self.weight is not None:
            return rms_norm(x, wide(self.weight) + 1, self.eps)
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        offset = ", unit_offset" if self.unit_offset else ""
        return f"{self.width}, eps={self.eps}{offset}" + (", weight=False" if self.weight is None else "")


class LayerNorm(nn.Module):
    """weight (width,), starting at 1; bias (width,), starting at 0, or none."""

    def __init__(self, width: int, eps: float = 1e-5, *, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}" + (", bias=False" if self.bias is None else "")


class DeepNorm(NamedTuple):
    """alpha multiplies the x of a post-norm residual sum; beta the spread with which feed-forward, value and output
    projections begin (`nn.init.deepnorm`). None: the model has no such part."""

    encoder_alpha: float | None
    encoder_beta: float | None
    decoder_alpha: float | None
    decoder_beta: float | None


def deepnorm_constants(encoder_layers: int, decoder_layers: int) -> DeepNorm:
    """The constants that let a post-norm model grow to 1,000 layers (arXiv:2203.00555, figure 2). With N layers alone

        alpha = (2N)^(1/4)   beta = (8N)^(-1/4)

    and with N of an encoder and M of a decoder

        encoder   alpha = 0.81 (N^4 M)^(1/16)   beta = 0.87 (N^4 M)^(-1/16)
        decoder   alpha = (3M)^(1/4)            beta = (12M)^(-1/4)
    """
    N, M = encoder_layers, decoder_layers
    if N < 0 or M < 0 or N + M == 0:
        raise HanlinError(f"DeepNorm needs layers to count; found {N} of an encoder and {M} of a decoder.")
    if N and M:
        both = (N**4 * M) ** (1 / 16)
        return DeepNorm(0.81 * both, 0.87 / both, (3 * M) ** 0.25, (12 * M) ** -0.25)
    alpha, beta = (2 * (N + M)) ** 0.25, (8 * (N + M)) ** -0.25
    return DeepNorm(alpha, beta, None, None) if N else DeepNorm(None, None, alpha, beta)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x (..., width), weight (width,), bias (width,) or None -> like x."""
    mixed = x.is_cpu and weight.dtype == torch.float32 and x.dtype == torch.bfloat16  # this kernel takes as it is:
    if mixed or weight.dtype == x.dtype:  # 1,024 x 768, forward and backward, 1.5 ms against 2.7 by way of fp32
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    high = wide(x)  # the product is fp32 too
    bias = None if bias is None else bias.to(high.dtype)
    return F.layer_norm(high, weight.shape, weight.to(high.dtype), bias, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (..., width), weight (width,) or None for 1 -> like x. One hand-written backward instead of a chain of
    elementwise ops."""
    if not torch.is_grad_enabled():  # autograd.Function costs 4 us a call, which one token of a small model feels
        if (normal := rows.rms_norm(x, weight, eps)) is not None:
            return normal
        if weight is None or weight.dtype == x.dtype:
            return torch.rms_norm(x, x.shape[-1:], weight, eps)  # the same numbers, 1.5 us less
        return _normalise(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def _normalise(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    high = wide(x)
    inverse = torch.rsqrt(high.square().mean(-1, keepdim=True).add_(eps))  # (..., 1)
    out = high * inverse
    return (out if weight is None else out.mul_(weight)).to(x.dtype), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        out, inverse = training.norm(x, weight, eps) or _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        found = training.norm_backward(x, weight, inverse, gradients[0], of_weight=ctx.needs_input_grad[1])
        if found is not None:
            return *found, None
        grad = gradients[0].to(inverse.dtype)
        normal = x.to(inverse.dtype) * inverse
        grad_weight = (grad * normal).reshape(-1, len(weight)).sum(0) if ctx.needs_input_grad[1] else None
        inner = grad.clone() if weight is None else grad * weight  # a clone: the next lines write into it
        slope = (inner * normal).mean(-1, keepdim=True)
        grad_x = inner.addcmul_(normal, slope, value=-1).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None
