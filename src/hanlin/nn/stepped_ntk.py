"""Qwen's dynamic NTK (arXiv:2309.16609, section 2.3): the base grows with the length of the text, in steps.

    alpha(n) = max(1, 2^ceil(log2(n / trained) + 1) - 1)        1 up to `trained` tokens, then 3, 7, 15 … by doublings
    base(n)  = theta * alpha^(D / (D - 2))

Between two doublings all texts share a base; `rope_scaling.DynamicNtk` has another one for each length.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hanlin.nn.rope_scaling import Frequencies, Length, RopeScaling, inverse_frequencies, ntk_theta


@dataclass(frozen=True)
class SteppedNtk(RopeScaling):
    """trained: the tokens of a text that the model was trained on.

    A pure function of the length of this pass: keys that a cache turned earlier keep the base of their own pass.
    (Qwen's code keeps the base of the prompt while it decodes; both agree as long as no doubling is crossed.)
    """

    trained: int
    by_length: ClassVar[bool] = True

    def __call__(self, dim: int, theta: float, length: Length = None, longest: int | None = None) -> Frequencies:
        lengths = length if isinstance(length, Tensor) else torch.tensor([length or 1])  # (rows, 1) or (1,)
        base = ntk_theta(dim, theta, self._alpha(lengths))
        return inverse_frequencies(dim, base.float()), 1.0

    def _alpha(self, length: Tensor) -> Tensor:
        """length (...) integers -> (...) fp64."""
        mantissa, exponent = torch.frexp(length.to(torch.float64) / self.trained)  # 1/2 <= mantissa < 1: all exact
        doublings = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=0)
        return 2.0 ** (doublings + 1).to(torch.float64) - 1.0
