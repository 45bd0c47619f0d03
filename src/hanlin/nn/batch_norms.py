"""Norms whose statistics go over tokens: batch, group and instance normalisation of x (rows, T, width).

    y = w (x - mean) / sqrt(var + eps) + b        mean and var are taken over
    batch      every token of every row, for each number of the width       arXiv:1502.03167
    group      the tokens of a row and a group of the width                  arXiv:1803.08494
    instance   the tokens of a row, for each number of the width             arXiv:1607.08022

They are here to be compared with LayerNorm: a token's output depends on the tokens behind it and on padding, so they
cannot stand in a model that writes from left to right. Statistics are fp32 in any precision (fp64 for fp64).
Parameters and buffers are named as in torch.nn, whose classes want the width in front of the tokens.
"""

import math

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.nn.wide import wide


class BatchNorm(nn.Module):
    """In training the statistics of the batch, and running ones are kept; in evaluation the running ones.

    momentum: what the newest batch weighs in the running statistics; None: all batches weigh the same. The running
    variance is the unbiased one (n / (n - 1)), the one that divides in training is not: as the paper has it.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, width: int, eps: float = 1e-5, *, momentum: float | None = 0.1, affine: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        self.width, self.eps, self.momentum = width, eps, momentum
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine and bias else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        _check_width(self, x)
        high = wide(x)
        if self.training:
            mean, var = self._observe(high)
        else:
            mean, var = self.running_mean.to(high.dtype), self.running_var.to(high.dtype)
        return _scaled((high - mean) * torch.rsqrt(var + self.eps), self.weight, self.bias).to(x.dtype)

    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = x.numel() // self.width
        if count < 2:
            raise HanlinError(f"Batch normalisation learns from at least 2 tokens a batch; found {count}.")
        var, mean = torch.var_mean(x.reshape(count, self.width), 0, correction=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), rate)
        return mean, var

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, momentum={self.momentum}"


class GroupNorm(nn.Module):
    """One mean and variance for each row and each of `groups` equal parts of the width."""

    def __init__(self, groups: int, width: int, eps: float = 1e-5, *, affine: bool = True, bias: bool = True) -> None:
        super().__init__()
        if groups < 1 or width % groups:
            raise HanlinError(f"A width of {width} does not divide into {groups} groups.")
        self.groups, self.width, self.eps = groups, width, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine and bias else None

    def forward(self, x: Tensor) -> Tensor:  # (rows, ..., width) -> like x
        _check_width(self, x)
        parts = wide(x).reshape(len(x), -1, self.groups, self.width // self.groups)  # (rows, T, groups, width / groups)
        var, mean = torch.var_mean(parts, (1, 3), correction=0, keepdim=True)
        normal = ((parts - mean) * torch.rsqrt(var + self.eps)).view(x.shape)
        return _scaled(normal, self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.width}, eps={self.eps}"


class InstanceNorm(GroupNorm):
    """One mean and variance for each row and each number of the width: a group is one number wide."""

    def __init__(self, width: int, eps: float = 1e-5, *, affine: bool = True, bias: bool = True) -> None:
        super().__init__(width, width, eps, affine=affine, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (rows, ..., width) -> like x
        if math.prod(x.shape[1:-1]) < 2:
            raise HanlinError(
                "Instance normalisation of a single token is 0 whatever the token; a row needs 2 or more."
            )
        return super().forward(x)


def _check_width(norm: BatchNorm | GroupNorm, x: Tensor) -> None:
    if x.shape[-1] != norm.width:  # a view would otherwise mix tokens and widths without a word
        raise HanlinError(f"This norm is over a width of {norm.width}; found (..., {x.shape[-1]}).")


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias
