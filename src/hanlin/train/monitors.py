"""How hard each kind of parameter is pulled, and how far it moves: measured in a few steps, free in all others.

    grad_norm/KIND      ||g||                    L2 norm of the gradient, before it is clipped
    update_ratio/KIND   ||w' - w|| / ||w||       what the optimiser's step did, decay and rate included

A ratio near 1e-3 is usual for matrices in the middle of a run; one near 1 rewrites them, one near 1e-6 leaves them be
(the rule of thumb of micrograd's and GPT-2's trainers; no paper claims more). Kinds are those of `train.optim`.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Named = Mapping[str, Tensor]
Total = Callable[[Tensor], Tensor]


class Monitors:
    """groups: {kind: {name: what the optimiser steps on}}, whole parameters or this rank's pieces of them. shares: of a
    name, 1 / ranks that hold the same numbers (default 1). total: the sum of a tensor over all ranks (default: itself).
    With ranks every rank must measure in the same steps.
    """

    def __init__(
        self, groups: Mapping[str, Named], *, shares: Mapping[str, float] | None = None, total: Total | None = None
    ) -> None:
        self.groups = {kind: dict(named) for kind, named in groups.items()}
        self._shares, self._total = shares or {}, total

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """{"grad_norm/KIND": norm} of the gradients as they are."""
        squares = self._squares(lambda name, p: p.grad)
        return {f"grad_norm/{kind}": value**0.5 for kind, value in zip(self.groups, squares.tolist(), strict=True)}

    @contextmanager
    def watch(self) -> Generator[dict[str, float]]:
        """Around the optimiser's step. What is yielded is filled at the end: {"update_ratio/KIND": ratio}; 0 for
        weights that are 0 and stay so, infinite for those that leave 0. One copy of the weights lives as long as the
        block and no longer."""
        found: dict[str, float] = {}
        before = {name: p.detach().clone() for named in self.groups.values() for name, p in named.items()}
        weights = self._squares(lambda name, p: before[name])
        try:
            yield found
            moved = self._squares(lambda name, p: before.pop(name).sub_(p.detach()))
        finally:
            before.clear()
        for kind, step, size in zip(self.groups, moved.tolist(), weights.tolist(), strict=True):
            found[f"update_ratio/{kind}"] = (step / size) ** 0.5 if size else float("inf") if step else 0.0

    @torch.no_grad()
    def _squares(self, of: Callable[[str, Tensor], Tensor | None]) -> Tensor:
        """(kinds,) fp64: the sum of squares of each kind, over all ranks."""
        device = next((p.device for named in self.groups.values() for p in named.values()), torch.device("cpu"))
        result = torch.zeros(len(self.groups), dtype=torch.float64, device=device)
        for place, named in enumerate(self.groups.values()):
            for name, parameter in named.items():
                value = of(name, parameter)
                if value is not None and value.numel():
                    result[place] += torch.linalg.vector_norm(value).double().square() * self._shares.get(name, 1.0)
        return result if self._total is None else self._total(result)
