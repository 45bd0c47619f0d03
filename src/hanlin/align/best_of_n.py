"""Best-of-N: of N answers to a prompt keep the one that the reward likes best (arXiv:2112.09332, 2203.02155).

It trains nothing, and is what a trained policy has to beat. How far it moves from the policy is known beforehand:

    P(best = y) = F(y)^N - F(before y)^N        F: chance of an answer with a reward of at most r(y)
    KL(best of N || policy) <= log N - (N - 1) / N                       equal where no two answers tie and each is rare

The mean reward of the best of n, for every n up to the N that were drawn, needs no further drawing (`expected_best`).
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hanlin.align.samples import Sample
from hanlin.core.errors import HanlinError

Item = TypeVar("Item")


def best_of_n(samples: Sequence[Sample], scores: Sequence[float]) -> list[Sample]:
    """The sample with the highest score of every group, in the order of the groups; of equal ones the first."""
    _same_length(samples, scores)
    best: dict[int, int] = {}
    for place, (sample, score) in enumerate(zip(samples, scores, strict=True)):
        if math.isnan(score):
            raise HanlinError(f"The score of answer {place} to prompt {sample.prompt.number} is NaN.")
        if sample.group not in best or score > scores[best[sample.group]]:
            best[sample.group] = place
    return [samples[place] for place in best.values()]


def best_of_n_kl(n: int) -> float:
    """The most that best-of-n can be away from its policy, in nats."""
    if n < 1:
        raise HanlinError(f"Best of {n}: expected at least 1.")
    return math.log(n) - (n - 1) / n


def best_of_n_distribution(chances: Tensor, rewards: Tensor, n: int) -> Tensor:
    """How likely each of a few answers is the best of n. chances (answers,) sum to 1; rewards (answers,); equal rewards
    share by their chances -> (answers,)."""
    if n < 1 or chances.shape != rewards.shape:
        raise HanlinError(f"Best of {n} among {list(chances.shape)} chances and {list(rewards.shape)} rewards.")
    at_most = torch.stack([chances[rewards <= reward].sum() for reward in rewards])
    below = torch.stack([chances[rewards < reward].sum() for reward in rewards])
    share = chances / (at_most - below).clamp_min(torch.finfo(chances.dtype).tiny)
    return (at_most**n - below**n) * share


def expected_best(scores: Sequence[float], n: int) -> float:
    """The mean, over all choices of n of these N scores, of the best: without bias for the best of n new answers.

    sum over i of s_(i) C(i - 1, n - 1) / C(N, n), s_(i) ascending: s_(i) is the best if the other n - 1 are below it.
    """
    total = len(scores)
    if not 1 <= n <= total:
        raise HanlinError(f"Best of {n} cannot be told from {total} answers; draw at least {n}.")
    ordered = sorted(scores)
    return sum(s * math.comb(i, n - 1) for i, s in enumerate(ordered)) / math.comb(total, n)


def _same_length(samples: Sequence[Item], scores: Sequence[float]) -> None:
    if len(samples) != len(scores):
        raise HanlinError(f"{len(samples)} answers and {len(scores)} scores; expected one each.")
