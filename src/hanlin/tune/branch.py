"""What LoRA does to one linear layer: W x + s B A x, the settings of it, and the weight that has it inside.

A branch is `Linear.branch`: it takes x and the product W x + b and gives what is added to that. A and B are children of
the layer. `tune.lora` hangs branches on a model; `tune.dora` has one more kind.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.nn.linear import Linear


@dataclass(frozen=True)
class LoraSettings:
    """rank: of the update; alpha: its weight; rslora: divide by sqrt(rank), which keeps large ranks learning; dropout:
    of what goes into A, in training; dora: learn the length of each row of the weight apart (`tune.dora`)."""

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise HanlinError(f"The rank of a LoRA is {self.rank!r}; it must be a whole number of at least 1.")
        if not self.alpha > 0:
            raise HanlinError(f"`alpha` of a LoRA is {self.alpha!r}; it must be positive.")
        if not 0 <= self.dropout < 1:
            raise HanlinError(f"`dropout` of a LoRA is {self.dropout!r}; it must be at least 0 and below 1.")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Branch:
    """s B A of one layer."""

    def __init__(self, layer: Linear, settings: LoraSettings, dtype: torch.dtype) -> None:
        self.layer, self.settings = layer, settings
        self.a = _factor(layer.in_features, settings.rank, layer.weight.device, dtype)
        self.b = _factor(settings.rank, layer.out_features, layer.weight.device, dtype)
        for factor in (self.a, self.b):
            factor.train(layer.training)

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:  # (..., in), W x + b (..., out) -> (..., out)
        return F.linear(self.low(x), self.b.weight.to(x.dtype))

    def low(self, x: Tensor) -> Tensor:
        """s A x, (..., rank)."""
        if self.settings.dropout and self.a.training:
            x = F.dropout(x, self.settings.dropout)
        return F.linear(x, self.a.weight.to(x.dtype)) * self.settings.scale

    def children(self) -> dict[str, nn.Module]:
        """What learns, by the name that it gets in the layer."""
        return {"lora_A": self.a, "lora_B": self.b}

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """A uniform in +-1 / sqrt(in), as the reference does (on the CPU, so that no device changes it); B zero."""
        a = torch.empty(self.a.weight.shape).uniform_(-1, 1, generator=generator) / math.sqrt(self.a.in_features)
        self.a.weight.copy_(a)
        self.b.weight.zero_()

    def merged(self) -> Tensor:
        """W + s B A, (out, in), fp32 or fp64."""
        update = self.update()
        return self.layer.weight.to(update.dtype) + update

    def unmerged(self) -> Tensor:
        """W, where `merged` stands in its place."""
        update = self.update()
        return self.layer.weight.to(update.dtype) - update

    def update(self) -> Tensor:
        """s B A, (out, in), fp32 or fp64."""
        wide = self.wide
        return (self.b.weight.to(wide) @ self.a.weight.to(wide)) * self.settings.scale

    @property
    def wide(self) -> torch.dtype:
        """The dtype to compute weights in: that of W and of A, but at least fp32."""
        return torch.promote_types(torch.promote_types(self.layer.weight.dtype, self.a.weight.dtype), torch.float32)


def _factor(width: int, out: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """Torch's own `Linear`, without values: `nn.frozen` shall leave it alone."""
    factor = nn.Linear(width, out, bias=False, device="meta", dtype=dtype)
    factor.weight = nn.Parameter(torch.empty(out, width, device=device, dtype=dtype))
    return factor
