"""Rotary position embedding (RoFormer, arXiv:2104.09864): a pair of dimensions turns by `position * theta^(-2i/D)`.

    half-split     pair i is (x_i, x_{i + D/2})       the layout of the Hugging Face weights of Llama
    interleaved    pair i is (x_{2i}, x_{2i + 1})     the paper's; GLM, DeepSeek, Llama 4
    partial        the first `dim` dimensions turn, the rest pass through
    two axes       each half of a head turns, half-split, by positions of its own (GLM, arXiv:2103.10360)

Tables say by their shape what they turn: (rows or 1, T, 1, D) for half-split pairs, (rows or 1, T, 1, G, D/G) for pairs
that are half-split within each of G groups: D/2 groups of two are interleaved pairs, two groups are two axes. A head
wider than D passes its rest through. So `rotate` needs nothing but the tables, which are made once a forward pass.

Angles are fp32 in any lower precision: at position 4,096 bf16 cannot tell neighbours apart. Models in fp64 have fp64
angles, of the same fp32 frequencies.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hanlin.core.errors import HanlinError
from hanlin.kernels import rows, training
from hanlin.nn.rope_scaling import Length, RopeScaling, inverse_frequencies


@dataclass(frozen=True)
class Rope:
    """How a layer's queries and keys turn. dim: how many leading dimensions of a head (None: all); interleaved: pairs
    (2i, 2i + 1); scaling: of the frequencies, for more positions than were trained (`nn.rope_scaling`)."""

    theta: float = 10_000.0
    dim: int | None = None
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not 0 < self.theta < math.inf:
            raise HanlinError(f"The rotary base is {self.theta}; it must be a positive number.")
        if self.dim is not None and (self.dim <= 0 or self.dim % 2):
            raise HanlinError(f"{self.dim} dimensions of a head turn; it must be a positive even number.")

    def frequencies(self, head_dim: int, length: Length = None, *, longest: int | None = None) -> tuple[Tensor, float]:
        """(inverse frequencies fp32 (dim / 2,), factor on cosine and sine).

        length: the longest position + 1 (or one for each row, (rows, 1) -> (rows, dim / 2)), longest: the positions the
        model's config names. Dynamic NTK and LongRoPE depend on them; the others take `longest` for lack of a value.
        """
        dim = head_dim if self.dim is None else self.dim
        if dim > head_dim or dim % 2:
            raise HanlinError(f"{dim} dimensions of a head of {head_dim} cannot turn in pairs.")
        return (self.scaling or RopeScaling())(dim, self.theta, length, longest)

    def tables(
        self, positions: Tensor, head_dim: int, dtype: torch.dtype, *, longest: int | None = None, length: Length = None
    ) -> tuple[Tensor, Tensor]:
        """positions (rows or 1, T) integers -> cosine and sine for `rotate`, in `dtype`.

        longest: as for `frequencies`. length: by default each row's own largest position + 1, so that no row depends on
        its neighbours; give what a sequence may grow to where turned keys are kept.
        """
        device, by_length = positions.device, self.scaling is not None and self.scaling.by_length
        if not by_length and not torch.compiler.is_compiling():
            inverse, factor = _kept_frequencies(self, head_dim, longest, device)
        else:
            if by_length and length is None:
                length = positions.amax(-1, keepdim=True) + 1  # (rows or 1, 1)
            inverse, factor = self.frequencies(head_dim, length, longest=longest)
            inverse = inverse.to(device)
        return rope_tables(positions, inverse, dtype, interleaved=self.interleaved, factor=factor)


def rope_tables(
    positions: Tensor, inverse: Tensor, dtype: torch.dtype, *, interleaved: bool = False, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """positions (rows or 1, T) integers, inverse (D/2,) or (rows or 1, D/2) -> cos and signed sin in `dtype`, both
    (rows or 1, T, 1, D), or (rows or 1, T, 1, D/2, 2) for interleaved pairs. factor: on both.

    The sine of a pair's first half carries the minus sign of the rotation: a turn is `x * cos + swap_halves(x) * sin`.
    """
    if inverse.dim() > 1:
        inverse = inverse[:, None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = (positions.to(wide)[..., None] * inverse)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    if interleaved:
        return torch.stack([cos, cos], -1).to(dtype), torch.stack([-sin, sin], -1).to(dtype)
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def block_rope_tables(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, *, half: bool = False
) -> tuple[Tensor, Tensor]:
    """Two axes (GLM, arXiv:2103.10360, section 2.2): positions (2, rows or 1, T), in the text and in the span that is
    being written -> cos and signed sin (rows or 1, T, 1, 2, head_dim / 2): one axis for each half of a head.

    half: frequencies rounded to fp16, with which ChatGLM-6B was trained: at position 1,000 up to 0.2 radians away."""
    if positions.dim() != 3 or len(positions) != 2 or head_dim % 4:
        raise HanlinError(
            f"Rotary positions on two axes need positions (2, rows, T) and heads of a multiple of 4; found "
            f"{tuple(positions.shape)} and {head_dim}."
        )
    inverse = inverse_frequencies(head_dim // 2, theta).to(positions.device)
    if half:
        inverse = inverse.half().float()
    tables = [rope_tables(axis, inverse, dtype) for axis in positions]
    cos, sin = (torch.stack(parts, 3) for parts in zip(*tables, strict=True))
    return cos, sin


def block_positions(start: Tensor, blank: Tensor, length: int) -> Tensor:
    """Positions for two axes: start (rows,) is the index of the token that starts the written span, blank (rows,) the
    place in the prompt that the span fills -> (2, rows, length).

        prompt    0 1 2 … start - 1     0 0 0 … 0
        span      blank blank blank …   1 2 3 …
    """
    index = torch.arange(length, device=start.device)[None]
    start, blank = start[:, None], blank[:, None]
    return torch.stack([torch.where(index < start, index, blank), (index - start + 1).clamp(min=0)])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (rows, T, heads, D) turned by its tables (see above). Backward turns by the negative angle.

    Whole rows of D at a time: writing the two halves apart is three times slower in bf16 (the inner loop is D/2 long).
    """
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin)
    turned = rows.rotate(x, cos, sin) if cos.dim() == x.dim() else None
    return _turn(x, cos, sin, 1.0) if turned is None else turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn_fast(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn_fast(gradients[0], cos, sin, -1.0), None, None


def _turn_fast(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    turned = training.turn(x, cos, sin, sign) if cos.dim() == x.dim() else None
    return _turn(x, cos, sin, sign) if turned is None else turned


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    if cos.dim() != x.dim() or cos.shape[-1] != x.shape[-1]:
        return _turn_groups(x, cos, sin, sign)
    first, second = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat([second, first], -1), sin, value=sign)


def _turn_groups(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Pairs within groups, or a part of a head: the leading dimensions that have tables are turned."""
    groups = cos.shape[3:]  # (D,) or (G, D / G)
    width = math.prod(groups)
    turned = _turn(x[..., :width].unflatten(-1, groups), cos, sin, sign).flatten(3)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


@lru_cache(maxsize=64)
def _kept_frequencies(rope: Rope, head_dim: int, longest: int | None, device: torch.device) -> tuple[Tensor, float]:
    """Frequencies that every pass shares, kept on their device: a decoded token pays for no more than its angles."""
    inverse, factor = rope.frequencies(head_dim, longest=longest)
    return inverse.to(device), factor
