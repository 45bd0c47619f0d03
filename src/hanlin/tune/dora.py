"""Weight-decomposed low-rank adaptation (DoRA, arXiv:2402.09353): direction and length of a weight learn apart.

    W x + b  ->  m V x / |V| + b      V = W + s B A; |V| (out,), the length of each of its rows; m (out,)

The direction V learns through A and B as in LoRA, the length m by itself; m starts at |W|, so that training starts
from the model as it is. |V| is a constant to the gradient (section 4.3 of the paper). Dropout acts on what goes into A
alone.

Nothing of the size of W is made: with g = m / |V| - 1, a row at a time,

    m V x / |V| + b = (W x + b) + g (W x + b) + (1 + g) s B A x - g b

adds to the product that is there, alone or packed with others, and

    |W + s B A|^2 = |W|^2 + 2 s B . (W A^T) + s^2 B . (B A A^T)

is one product of W with `rank` vectors. In bf16 g keeps three digits, where 1 + g would go in steps of 0.8 %.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.nn.linear import Linear
from hanlin.tune.branch import Branch, LoraSettings


class DoraBranch(Branch):
    """m V / |V| of one layer, for W; m is a third child of the layer."""

    def __init__(self, layer: Linear, settings: LoraSettings, dtype: torch.dtype) -> None:
        super().__init__(layer, settings, dtype)
        self.m = Magnitude(layer.out_features, layer.weight.device, dtype)
        self._merged_with: Tensor | None = None

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        gain = self.gain()
        b, bias = absorb(gain, self.b.weight, self.layer.bias)
        added = F.linear(self.low(x), b.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return stretch(out, gain, added)

    def children(self) -> dict[str, nn.Module]:
        return super().children() | {"lora_magnitude_vector": self.m}

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        super().draw(generator)
        self.m.weight.copy_(self.lengths())

    def gain(self) -> Tensor:
        """g of each row, (out,), fp32 or fp64; its gradient is that of m alone."""
        return self.m.weight.to(self.wide) / self.lengths() - 1

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """|W + s B A| of each row."""
        weight = self.layer.weight
        if weight.is_meta and not self.a.weight.is_meta:
            raise HanlinError(
                "A layer with DoRA is frozen into a faster layout and its plain weight given back; `merge()` before "
                "that, or let the engine load the adapter from its files."
            )
        wide = self.wide
        a, b = self.a.weight.to(wide), self.b.weight.to(wide) * self.settings.scale
        return row_lengths(torch.linalg.vector_norm(weight, dim=1, dtype=wide), F.linear(weight.to(wide), a), a, b)

    def merged(self) -> Tensor:
        self._merged_with = 1 + self.gain()  # the way back: what V was divided by is not to be seen in the result
        return self._merged_with[:, None] * super().merged()

    def unmerged(self) -> Tensor:
        assert self._merged_with is not None
        update = self.update()
        return self.layer.weight.to(update.dtype) / self._merged_with[:, None] - update


class Magnitude(nn.Module):
    """m as PEFT holds it: the weight of a module. (out,)"""

    def __init__(self, out: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, device=device, dtype=dtype))


def row_lengths(base: Tensor, product: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """|W + B A| of each row, (out,): base (out,), the lengths of the rows of W; product (out, rank), W A^T; a (rank,
    in); b (out, rank), with its scale. A row of zeros is as long as the smallest number, so that nothing divides by 0.
    """
    squares = base.square() + ((2 * product + b @ (a @ a.T)) * b).sum(-1)
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def absorb(gain: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(1 + g) B and -g b: gain (out,), b (out, rank), bias (out,) or None."""
    return b + gain[:, None] * b, None if bias is None else -gain * bias


def stretch(out: Tensor, gain: Tensor, added: Tensor) -> Tensor:
    """g out + added, what is to be added to out: out (..., out), gain (out,), added (..., out)."""
    return torch.addcmul(added, out, gain.to(out.dtype))
