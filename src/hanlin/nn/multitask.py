"""Several losses at once: each is an un-normalised sum with a denominator of its own, and stays one.

    fixed         sum_i w_i L_i
    uncertainty   sum_i k_i exp(-s_i) L_i + s_i / 2,   s_i = log sigma_i^2 learnt       (arXiv:1705.07115, eq. 7 and 10)

k is 1/2 for a regression (a Gaussian's squared error) and 1 for a classification (a softmax at temperature sigma^2).
A hard task gets a large sigma and a small weight; s_i / 2 keeps sigma from growing for ever. At rest
exp(s_i) = 2 k_i L_i, so that every task weighs the same.

L_i is a mean, and what comes in and goes out here are sums: the term s_i / 2 is given count_i times, and the trainer's
one division by the step's whole count gives it back once, however the step was cut into micro-batches.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError

Sums = dict[str, Tensor]  # task -> un-normalised sum


def fixed_weights(sums: Mapping[str, Tensor], weights: Mapping[str, float]) -> Sums:
    """Each task's sum times its weight; both name the same tasks."""
    _check_names(sums, list(weights), "weights")
    return {task: weights[task] * value for task, value in sums.items()}


class UncertaintyWeights(nn.Module):
    """Learns one log variance a task, `log_variance` (tasks,), from 0: sigma = 1. Its parameter wants no weight decay.

    kinds: of every task, "regression" or "classification".
    """

    def __init__(self, kinds: Mapping[str, Literal["regression", "classification"]]) -> None:
        super().__init__()
        for task, kind in kinds.items():
            if kind not in ("regression", "classification"):
                raise HanlinError(f'The task "{task}" is of kind {kind!r}; it is "regression" or "classification".')
        if not kinds:
            raise HanlinError("Uncertainty weights need at least one task.")
        self.tasks = tuple(kinds)
        self._factors = tuple(0.5 if kind == "regression" else 1.0 for kind in kinds.values())
        self.log_variance = nn.Parameter(torch.zeros(len(kinds)))

    def forward(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> Sums:
        """sums: un-normalised, of this micro-batch; counts: its own denominators -> sums for the same denominators.

        A task with nothing in this micro-batch has sum 0 and count 0."""
        _check_names(sums, self.tasks, "tasks")
        _check_names(counts, self.tasks, "tasks")
        logs = self.log_variance.unbind()
        return {
            task: k * torch.exp(-s) * sums[task] + counts[task] * s / 2
            for task, k, s in zip(self.tasks, self._factors, logs, strict=True)
        }


def _check_names(given: Mapping[str, object], known: Sequence[str], what: str) -> None:
    for task in given:
        if task not in known:
            near = get_close_matches(task, known, n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise HanlinError(f'There is no task "{task}" among the {what} ({", ".join(known)}).{hint}')
    missing = [task for task in known if task not in given]
    if missing:
        raise HanlinError(f'The task "{missing[0]}" is missing; every task takes part in every step, with a sum of 0.')
