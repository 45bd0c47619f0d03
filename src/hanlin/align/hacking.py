"""Reward hacking: the reward that is trained on rises, and what it stands for falls (Goodhart; arXiv:2210.10760).

    proxy   the reward of training, often noisy
    truth   held-out accuracy, a judge, a gold reward: what the proxy should stand for, measured now and then

Whether a curve rises or falls is asked of the order of its values alone: Kendall's S = pairs in order - pairs out of
order (Mann 1945). That needs no model of the noise and no outlier fools it; without a trend its distribution is known
exactly, so `chance` is how seldom one look may be wrong. One test over many steps looks many times, hence so small.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

from hanlin.core.errors import HanlinError

Curve = Sequence[tuple[float, float]]  # (step, value), steps ascending

FEWEST = 8  # values below which even a straight fall proves nothing
CHANCE = 5e-5


def hacking_alarm(
    proxy: Curve,
    truth: Curve,
    *,
    names: tuple[str, str] = ("the reward", "held-out accuracy"),
    window: int = 20,
    chance: float = CHANCE,
    least: float = 0.05,
) -> str | None:
    """A sentence for people if the proxy rises while the truth falls, at the end of the curves; else None.

    window: the last so many values of the truth are looked at, and every shorter end of them down to 8; of the proxy
    what was measured over the same steps. chance: of a trend by accident, of each curve. least: the truth must have
    lost this share of what it was, or it is not worth a word.
    """
    if window < FEWEST or not 0 < chance < 1:
        raise HanlinError(
            f"A window of {window} values at a chance of {chance:g}: expected at least {FEWEST}, below 1."
        )
    for name, curve in zip(names, (proxy, truth), strict=True):
        if any(a[0] >= b[0] for a, b in pairwise(curve)):
            raise HanlinError(f"The steps of {name} do not ascend.")
    truth = [point for point in truth if math.isfinite(point[1])][-window:]
    for start in range(len(truth) - FEWEST + 1):
        end = truth[start:]
        first, last = end[0][0], end[-1][0]
        meant = [point for point in proxy if first <= point[0] <= last and math.isfinite(point[1])]
        if _falls(_values(end), chance, least) and len(meant) >= FEWEST and trend_chance(_values(meant)) <= chance:
            return _sentence(names, meant, end)
    return None


def trend_chance(values: Sequence[float], *, exact: int = 60) -> float:
    """How likely an order without a trend rises as clearly as these values, or more: 0.5 or so for none. (Of the
    negated values: falls.) Exact up to so many values, beyond by the normal distribution."""
    count = len(values)
    s = sum((b > a) - (b < a) for i, a in enumerate(values) for b in values[i + 1 :])
    pairs = count * (count - 1) // 2
    if count <= exact:
        inversions = (pairs - s) // 2
        ways = _orders(count)
        return sum(ways[: inversions + 1]) / math.factorial(count)
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return 0.5 * math.erfc((s - 1) / deviation / math.sqrt(2))


def _falls(values: Sequence[float], chance: float, least: float) -> bool:
    before, after = ends(values)
    return before - after >= least * abs(before) and before > after and trend_chance([-v for v in values]) <= chance


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and the last third."""
    third = max(1, len(values) // 3)
    return sum(values[:third]) / third, sum(values[-third:]) / third


def _values(curve: Curve) -> list[float]:
    return [value for _, value in curve]


def _sentence(names: tuple[str, str], proxy: Curve, truth: Curve) -> str:
    up, down = ends(_values(proxy)), ends(_values(truth))
    peak = max(truth, key=lambda point: point[1])
    return (
        f"{names[0]} rose from {up[0]:.3g} to {up[1]:.3g} in the steps {truth[0][0]:g} to {truth[-1][0]:g}, while "
        f"{names[1]} fell from {down[0]:.3g} to {down[1]:.3g}: the policy learns to please the reward and no longer "
        f"what it stands for. Go back to step {peak[0]:g}, and lower the rate, hold it closer to the reference (KL), "
        "or learn a new reward from answers of now."
    )


@cache
def _orders(count: int) -> list[int]:
    """How many orders of `count` different values have 0, 1, 2 ... pairs out of order (Mahonian numbers)."""
    ways = [1]
    for size in range(2, count + 1):
        longer = [0] * (len(ways) + size - 1)
        for inversions, number in enumerate(ways):
            for more in range(size):
                longer[inversions + more] += number
        ways = longer
    return ways
