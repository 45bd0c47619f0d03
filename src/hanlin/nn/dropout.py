"""Dropout: numbers that are left out at random while a model learns, so that no unit can rely on another one.

    inverted  y = x d / (1 - p)                       d ~ Bernoulli(1 - p)      arXiv:1207.0580, arXiv:1506.02142
    alpha     y = a (x d + s (1 - d)) + b             s = -lambda alpha         arXiv:1706.02515, section "dropout"

Inverted: the mean stays, so that nothing needs to be done when the model is used. Alpha: a number left out becomes what
SELU tends to, and a and b restore mean 0 and variance 1, without which self-normalising networks lose their point.
A generator makes the choice repeatable on its own, apart from torch's global one.
"""

import torch
from torch import Generator, Tensor, nn

from hanlin.core.errors import HanlinError

SELU_FLOOR = -1.0507009873554805 * 1.6732632423543772  # -lambda alpha: SELU far below zero


def dropout(x: Tensor, p: float, *, generator: Generator | None = None) -> Tensor:
    """Each number of x is 0 with probability p, else x / (1 - p). Backward keeps one byte a number."""
    keep = _keep(x, check_probability(p), generator)
    return x * keep if p == 1 else x * keep / (1 - p)


def alpha_dropout(x: Tensor, p: float, *, generator: Generator | None = None) -> Tensor:
    """Dropout behind SELU: x with mean 0 and variance 1 keeps both. p = 1 leaves a constant, so it is refused."""
    if check_probability(p) == 1:
        raise HanlinError("Alpha dropout cannot leave out everything and keep the variance: p must be below 1.")
    keep = _keep(x, p, generator)
    a = ((1 - p) * (1 + p * SELU_FLOOR**2)) ** -0.5
    return torch.where(keep, x, SELU_FLOOR) * a - a * p * SELU_FLOOR


class Dropout(nn.Module):
    """`dropout` while training, nothing in evaluation. generator: on the device of x; None: torch's own."""

    def __init__(self, p: float, *, generator: Generator | None = None) -> None:
        super().__init__()
        self.p, self.generator = check_probability(p), generator

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, generator=self.generator) if self.training and self.p else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


class AlphaDropout(Dropout):
    """`alpha_dropout` while training, nothing in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return alpha_dropout(x, self.p, generator=self.generator) if self.training and self.p else x


def check_probability(p: float) -> float:
    """p, or `HanlinError` if it is no probability."""
    if not 0 <= p <= 1:
        raise HanlinError(f"A dropout probability lies between 0 and 1; found {p}.")
    return p


def _keep(x: Tensor, p: float, generator: Generator | None) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
