"""Positions that are added to the token vectors: sinusoidal (arXiv:1706.03762, section 3.5), learnt (arXiv:1705.03122).

    angle(p, i) = p / 10000^(2i / width)        i < width / 2
    interleaved    sin, cos, sin, cos, ...      the paper's, XLM's
    halves         sin, ..., sin, cos, ..., cos     Marian's

Angles are fp64 and the table is fp32 in any precision, as the reference models keep it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError

Layout = Literal["interleaved", "halves"]


def sinusoids(positions: Tensor, width: int, *, layout: Layout = "interleaved", theta: float = 10_000.0) -> Tensor:
    """positions (...) -> (..., width) fp32. An odd width has one sine more than cosines."""
    index = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles = positions.to(torch.float64)[..., None] / theta ** (index / width)
    sin, cos = angles.sin().float(), angles.cos().float()
    if layout == "halves":
        return torch.cat([sin, cos[..., : width // 2]], -1)
    return torch.stack([sin, cos], -1).flatten(-2)[..., :width]


class SinusoidalPositions(nn.Module):
    """A fixed table of `count` positions, made when it is first read: a checkpoint holds nothing of it."""

    def __init__(self, count: int, width: int, *, layout: Layout = "interleaved") -> None:
        super().__init__()
        if layout not in ("interleaved", "halves"):
            raise HanlinError(f"The layout of sinusoids is {layout!r}; expected 'interleaved' or 'halves'.")
        self.count, self.width, self.layout = count, width, layout
        self._tables: dict[torch.device, Tensor] = {}

    def forward(self, positions: Tensor) -> Tensor:  # (rows or 1, T) integers -> (rows or 1, T, width) fp32
        """`HanlinError` for a position outside 0 … count - 1."""
        check_positions(positions, 0, self.count)
        if torch.compiler.is_compiling():
            return sinusoids(positions, self.width, layout=self.layout)
        return F.embedding(positions, self._table(positions.device))

    def extra_repr(self) -> str:
        return f"{self.count}, {self.width}, layout={self.layout!r}"

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            everything = torch.arange(self.count, device=device)
            self._tables[device] = sinusoids(everything, self.width, layout=self.layout)
        return self._tables[device]


class LearnedPositions(nn.Embedding):
    """A learnt vector for each of `count` positions: weight (offset + count, width), position p in row offset + p.

    offset: rows in front of position 0. BART and OPT have 2; RoBERTa has padding_idx + 1, the last of them for padding,
    which is then position -1.
    """

    def __init__(self, count: int, width: int, *, offset: int = 0) -> None:
        if offset < 0:
            raise HanlinError(f"The positions' table begins {offset} rows in; it must be 0 or more.")
        super().__init__(offset + count, width)
        self.offset = offset

    def forward(self, input: Tensor) -> Tensor:  # (rows or 1, T) positions -> (rows or 1, T, width)
        """`HanlinError` for a position that has no row."""
        check_positions(input, -self.offset, self.num_embeddings - self.offset)
        return super().forward(input + self.offset if self.offset else input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset={self.offset}"


def check_positions(positions: Tensor, start: int, stop: int) -> None:
    """`HanlinError` unless all positions are in start … stop - 1.

    On an accelerator, or while a graph is recorded, it does not look: reading a value there would stall the stream.
    """
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or not positions.numel():
        return
    low, high = (int(x) for x in positions.aminmax())
    if low < start or high >= stop:
        found = high if high >= stop else low
        raise HanlinError(
            f"Position {found} is outside the table of positions, which has {start} … {stop - 1}. If the text is "
            "longer than this model reads, shorten it, or use a model with more positions."
        )
