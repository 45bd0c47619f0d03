"""What the independent twins share: parameters planted under published names, a folder in the published layout, and the
plainest forms of what every Transformer has. A twin is slow, loops over rows and heads, and uses nothing of Hanlin."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FP32 = torch.float32  # held here: the tests lift `torch.float32` to fp64 while a reference in fp64 runs
Shape = tuple[int, ...]


class Twin(nn.Module):
    """config: what stands in `config.json`; shapes: published name -> shape of each parameter."""

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
        super().__init__()
        self.config = dict(config)
        for name, shape in shapes.items():
            *path, last = name.split(".")
            home: nn.Module = self
            for part in path:
                if not hasattr(home, part):
                    home.add_module(part, nn.Module())
                home = getattr(home, part)
            home.register_parameter(last, nn.Parameter(torch.zeros(shape)))

    def w(self, name: str) -> Tensor:
        return self.get_parameter(name)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x W^T, and + b where the checkpoint has one."""
        y = x @ self.w(f"{name}.weight").T
        names = dict(self.named_parameters())
        return y + names[f"{name}.bias"] if f"{name}.bias" in names else y

    def stored(self) -> dict[str, Tensor]:
        """What a published checkpoint holds."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.stored(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight + bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def frequencies(dim: int, base: float) -> Tensor:
    """base^(-2i/dim), in fp32 as published code has them."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=FP32) / dim)


def turn_halves(x: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
    """x (T, D): number i of the first half and number i of the second turn together."""
    angle = positions.to(x.dtype)[:, None] * inverse.to(x.dtype)
    n = angle.shape[1]
    a, b, rest = x[:, :n], x[:, n : 2 * n], x[:, 2 * n :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], 1)


def turn_pairs(x: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
    """x (T, D): neighbours turn together, the rest stays."""
    columns = list(x.unbind(1))
    for i, frequency in enumerate(inverse.to(x.dtype)):
        angle = positions.to(x.dtype) * frequency
        a, b = columns[2 * i], columns[2 * i + 1]
        columns[2 * i], columns[2 * i + 1] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.stack(columns, 1)


def read(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """One head of one row: q, k, v (T, D), visible (T, T) -> (T, D)."""
    scores = q @ k.T / math.sqrt(q.shape[1]) + bias
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), -1) @ v


def past(length: int) -> Tensor:
    """(T, T): the query of a row sees the keys up to its own column."""
    return torch.ones(length, length, dtype=torch.bool).tril()
