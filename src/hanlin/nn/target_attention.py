"""Target attention of the Deep Interest Network (arXiv:1706.06978): what of the past matters for this candidate?

    out = sum_j a(q, k_j) k_j        a = MLP([q, k_j, q - k_j, q * k_j]) -> one number

q is the candidate (an item that may be shown), k_j the items that the user chose before. The activation unit `a` learns
how to compare, where attention has a product; its numbers are not brought to sum 1 (paper, section 4.3), so that the
length of `out` says how strong the interest is.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.nn.activations import activation as named
from hanlin.nn.batch_norms import BatchNorm
from hanlin.nn.linear import Linear


class TargetAttention(nn.Module):
    """hidden: widths of the activation unit's layers; activation: "dice" (the paper's) or a name of `nn.activations`;
    softmax: bring the weights to sum 1 all the same, as most later systems do."""

    def __init__(
        self, width: int, hidden: tuple[int, ...] = (80, 40), *, activation: str = "dice", softmax: bool = False
    ) -> None:
        super().__init__()
        self.width, self.softmax = width, softmax
        sizes = [4 * width, *hidden]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))
        self.dices = nn.ModuleList(Dice(size) for size in hidden) if activation == "dice" else None
        self.activation = None if activation == "dice" else named(activation)
        self.score = Linear(sizes[-1], 1)

    def forward(self, candidate: Tensor, sequence: Tensor, valid: Tensor | None = None) -> Tensor:
        """candidate (rows, width), sequence (rows, T, width), valid (rows, T) bool, True where there is an item (None:
        everywhere) -> (rows, width). A row without items gives 0."""
        weights = self.weights(candidate, sequence, valid)
        return (weights[:, None] @ sequence).squeeze(1)

    def weights(self, candidate: Tensor, sequence: Tensor, valid: Tensor | None = None) -> Tensor:
        """How much each item matters, (rows, T); 0 where there is none."""
        rows, length, width = sequence.shape
        if candidate.shape != (rows, width) or width != self.width:
            raise HanlinError(
                f"Target attention of width {self.width} expects candidates (rows, {self.width}) and sequences "
                f"(rows, T, {self.width}); found {tuple(candidate.shape)} and {tuple(sequence.shape)}."
            )
        valid = torch.ones(rows, length, dtype=torch.bool, device=sequence.device) if valid is None else valid
        if valid.shape != (rows, length) or valid.dtype != torch.bool:
            raise HanlinError(f"`valid` is bool ({rows}, {length}); found {valid.dtype} {tuple(valid.shape)}.")
        k = sequence[valid]  # (items, width): padding costs nothing and stays out of Dice's statistics
        q = candidate[:, None].expand_as(sequence)[valid]
        found = self._unit(torch.cat([q, k, q - k, q * k], -1))  # (items,)
        if not self.softmax:
            return sequence.new_zeros(rows, length).masked_scatter(valid, found)
        scores = sequence.new_full((rows, length), float("-inf")).masked_scatter(valid, found)
        return scores.softmax(-1).masked_fill(~valid, 0)  # a row without items is NaN until here

    def _unit(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if self.dices is not None:
                x = self.dices[index](x)
            elif self.activation is not None:
                x = self.activation(x)
        return self.score(x).squeeze(-1)


class Dice(nn.Module):
    """The data-adaptive activation (section 5.3): p x + (1 - p) alpha x with p = sigmoid((x - mean) / sqrt(var + eps)):
    PReLU whose bend lies where the data are. Mean and variance as in batch normalisation; alpha (width,) is learnt."""

    def __init__(self, width: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.norm = BatchNorm(width, eps, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        p = torch.sigmoid(self.norm(x))
        return p * x + (1 - p) * self.alpha.to(x.dtype) * x
