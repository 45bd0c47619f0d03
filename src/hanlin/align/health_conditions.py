"""Conditions of a run's health: functions of the curves so far that say whether something is wrong, and how bad.

A condition answers with a `Found`, or with None. It looks at medians, at means against their standard error and at
rank tests (`align.hacking`), never at a single value: a batch is noisy, and a monitor that cries wolf is turned off.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from statistics import fmean, median, stdev

from hanlin.align.hacking import FEWEST, Curve, ends, hacking_alarm, trend_chance

KEPT = 4096  # newest points of each metric
OPENING = 10  # and its first ones
FEW = 60  # values of a rank test at most: there its distribution is exact


@dataclass
class Line:
    """What is remembered of one metric: (step, value)."""

    opening: list[tuple[float, float]] = field(default_factory=list)
    points: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, step: float, value: float) -> None:
        """In place of the last point if that was at the same step."""
        for points in (self.opening, self.points):
            if points and points[-1][0] == step:
                points.pop()
        if len(self.opening) < OPENING:
            self.opening.append((step, value))
        self.points.append((step, value))

    def forget(self, step: float) -> None:
        """What was seen at `step` and after it did not happen."""
        for points in (self.opening, self.points):
            while points and points[-1][0] >= step:
                points.pop()


class Seen:
    """The curves so far, by metric."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}

    def curve(self, metric: str) -> Curve:
        """Its newest points, oldest first."""
        line = self.lines.get(metric)
        return list(line.points) if line else []

    def last(self, metric: str, rows: int) -> list[float]:
        """Its newest `rows` values, or what there is."""
        line = self.lines.get(metric)
        if line is None:
            return []
        return [value for _, value in islice(reversed(line.points), rows)][::-1]

    def opening(self, metric: str) -> list[float]:
        """Its first values."""
        line = self.lines.get(metric)
        return [value for _, value in line.opening] if line else []

    def count(self, metric: str) -> int:
        line = self.lines.get(metric)
        return len(line.points) if line else 0


@dataclass(frozen=True)
class Found:
    """badness: above 0, twice as much is clearly worse; figures: what the sentence names."""

    badness: float
    figures: dict[str, float]


Condition = Callable[[Seen, str, int], Found | None]  # (curves, metric, rows)


def fell(share: float, *, least: float, settle: int = 3) -> Condition:
    """By `share` or more from the highest to now, each a median of `settle`; from below `least` it says nothing."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        values = seen.last(metric, rows)
        if len(values) < 2 * settle:
            return None
        now = median(values[-settle:])
        before = max(median(values[i : i + settle]) for i in range(len(values) - 2 * settle + 1))
        if before < least or now > (1 - share) * before:
            return None
        return Found(before / max(now, 1e-6), {"before": before, "now": now, "percent": 100 * (1 - now / before)})

    return condition


def above(limit: float, *, below: float | None = None) -> Condition:
    """The median of all `rows` values, between `limit` and `below`."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        values = seen.last(metric, rows)
        if len(values) < rows or (now := median(values)) <= limit or (below is not None and now >= below):
            return None
        return Found(now / limit, {"now": now, "percent": 100 * now})

    return condition


def silent(limit: float, *, easy: bool) -> Condition:
    """Too many groups whose answers are worth the same, with a mean reward above the middle (easy) or not."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        values, rewards = seen.last(metric, rows), seen.last("reward", rows)
        if len(values) < rows or not rewards or (now := median(values)) <= limit:
            return None
        reward = fmean(rewards)
        if (reward > 0.5) != easy:
            return None
        return Found((1 - limit) / max(1 - now, 0.02), {"percent": 100 * now, "reward": reward})

    return condition


def never(seen: Seen, metric: str, rows: int) -> Found | None:
    """All of the values are 0."""
    values = seen.last(metric, rows)
    return Found(1.0, {}) if len(values) >= rows and not any(values) else None


def grew_alone(times: float, *, settle: int = 5) -> Condition:
    """Grew `times` as large within the rows, while the reward did not rise."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        values = seen.last(metric, rows)
        if len(values) < 4 * settle:
            return None
        before, now = median(values[:settle]), median(values[-settle:])
        rewards = seen.last("reward", rows)
        if before <= 0 or now < times * before or _rises(rewards):
            return None
        return Found(now / before, {"before": before, "now": now, "times": now / before})

    return condition


def drifts(answer: float, token: float) -> Condition:
    """Nats from the reference: more than `answer` an answer and `token` a token, and growing."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        values = seen.last(metric, rows)
        lengths = seen.last("answer/length", rows)
        if len(values) < rows or not lengths:
            return None
        length = max(fmean(lengths), 1.0)
        if metric == "kl/k1":  # a mean over tokens
            if seen.count("kl/answer"):
                return None
            values = [value * length for value in values]
        now, before = fmean(values[-5:]), fmean(values[:5])
        if now <= answer or now / length <= token or now < 1.5 * before or trend_chance(values) > 1e-3:
            return None
        return Found(now / answer, {"now": now, "before": before, "token": now / length})

    return condition


def clipped(limit: float) -> Condition:
    """The share of tokens beyond either side of the clip."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        high, low = seen.last(metric, rows), seen.last("clip_low", rows)
        if len(high) < rows or len(low) < rows:
            return None
        share = median(a + b for a, b in zip(high, low, strict=True))
        return Found(share / limit, {"percent": 100 * share}) if share > limit else None

    return condition


def leaps(times: float, *, fewest: int = 10) -> Condition:
    """The newest value is `times` the median of those before it; zeros (silent rounds) are left out."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        values = seen.last(metric, rows)
        before = [value for value in values[:-1] if value > 0]
        if len(before) < fewest:
            return None
        usual, now = median(before), values[-1]
        return Found(now / usual, {"now": now, "usual": usual, "times": now / usual}) if now > times * usual else None

    return condition


def stands_still(seen: Seen, metric: str, rows: int) -> Found | None:
    """No trend over the rows, nor are they above the first ones, and yet most groups say something."""
    values, silences = seen.last(metric, rows), seen.last("groups/silent", rows)
    if len(values) < rows or not silences or fmean(silences) >= 0.5:
        return None
    opening = seen.opening(metric)
    error = (stdev(opening) ** 2 / len(opening) + stdev(values) ** 2 / len(values)) ** 0.5
    if fmean(values) - fmean(opening) > error or trend_chance(thin(values)) <= 0.2:
        return None
    return Found(1.0, {"reward": fmean(values), "percent": 100 * fmean(silences)})


def explains_nothing(seen: Seen, metric: str, rows: int) -> Found | None:
    """Below 0, as the median and nearly always, after twice as many lines."""
    values = seen.last(metric, rows)
    if seen.count(metric) < 2 * rows:
        return None
    now = median(values)
    if now >= -0.02 or sum(value < 0 for value in values) < 0.8 * rows:
        return None
    return Found(1.0 - now, {"now": now})


def forgets(share: float) -> Condition:
    """A loss on held-out data is so much above its first value, and goes on rising."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        values, opening = seen.last(metric, rows), seen.opening(metric)
        if len(values) < 2 or (before := opening[0]) <= 0:
            return None
        now = values[-1]
        if now < (1 + share) * before or now <= values[-2]:
            return None
        return Found(now / before - 1, {"before": before, "now": now, "percent": 100 * (now / before - 1)})

    return condition


def overfits(share: float) -> Condition:
    """A held-out loss is so much above its lowest, two evaluations long."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        values = seen.last(metric, rows)
        if len(values) < 4 or (best := min(values)) <= 0 or min(values[-2:]) < (1 + share) * best:
            return None
        return Found(values[-1] / best - 1, {"best": best, "now": values[-1]})

    return condition


def hacked(seen: Seen, metric: str, rows: int) -> Found | None:
    """The reward rises and what it stands for falls (`align.hacking`)."""
    whole, reward = seen.curve(metric)[-rows:], seen.curve("reward")

    def looked_at(truth: Curve) -> tuple[Curve, bool]:
        proxy = thin_curve([point for point in reward if truth[0][0] <= point[0] <= truth[-1][0]])
        return proxy, hacking_alarm(proxy, truth, window=max(FEWEST, len(truth))) is not None

    if len(whole) < FEWEST or not looked_at(whole)[1]:
        return None
    for start in range(len(whole) - FEWEST, -1, -1):  # the figures are of the shortest end that shows it
        truth = whole[start:]
        proxy, shows = looked_at(truth)
        if shows:
            break
    before, now = ends([value for _, value in truth])
    low, high = ends([value for _, value in proxy])
    best = max(truth, key=lambda point: point[1])[0]
    figures = {"before": before, "now": now, "reward_before": low, "reward": high, "best": best}
    return Found(1.0 + (before - now) / max(abs(before), 1e-9), figures)


def worse_than_at_first(least: float) -> Condition:
    """The mean of the last three is below the first by `least` of it and by five times what noise does."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        values, opening = seen.last(metric, rows), seen.opening(metric)
        if len(values) < 8:
            return None
        moves = [abs(b - a) for a, b in pairwise(values)]  # of normal noise: 0.954 deviations are the median of these
        noise = max(median(moves) / 0.954, 0.4 * (fmean(move**2 for move in moves) / 2) ** 0.5)
        first, now = opening[0], fmean(values[-3:])
        floor = max(least * abs(first), 0.03 if min(values) >= 0 and max(values) <= 1 else 0.0)
        if max(values[-3:]) > first - floor or first - now <= max(floor, 5 * noise * (1 + 1 / 3) ** 0.5):
            return None
        rewards = (seen.opening("reward"), seen.last("reward", OPENING))
        before, reward = (fmean(values) if values else float("nan") for values in rewards)
        figures = {"first": first, "now": now, "reward_before": before, "reward": reward}
        return Found((first - now) / max(floor, 1e-9), figures)

    return condition


def both_fall(seen: Seen, metric: str, rows: int) -> Found | None:
    """Since the first lines chosen answers lost more than half of what the margin won, and go on falling."""
    chosen, rejected = seen.last(metric, rows), seen.last("rewards/rejected", rows)
    if len(chosen) < rows or len(rejected) < rows:
        return None
    lost = fmean(seen.opening(metric)[:3]) - fmean(chosen[-5:])
    other = fmean(seen.opening("rewards/rejected")[:3]) - fmean(rejected[-5:])
    if lost <= 0 or other <= 0 or lost <= 0.5 * (other - lost) or trend_chance([-v for v in chosen]) > 1e-3:
        return None
    return Found(lost, {"chosen": lost, "rejected": other})


def at_once(limit: float, within: int) -> Condition:
    """All rows reach `limit`, among the first `within`."""

    def condition(seen: Seen, metric: str, rows: int) -> Found | None:
        values = seen.last(metric, rows)
        if len(values) < rows or seen.count(metric) > within or min(values) < limit:
            return None
        return Found(1.0, {"lines": float(seen.count(metric))})

    return condition


def _rises(values: Sequence[float]) -> bool:
    return len(values) > 3 and trend_chance(thin(values)) <= 0.05


def thin(values: Sequence[float], most: int = FEW) -> list[float]:
    """At most so many means of equal stretches."""
    count = min(len(values), most)
    edges = [len(values) * i // count for i in range(count + 1)] if count else []
    return [fmean(values[a:b]) for a, b in pairwise(edges)]


def thin_curve(curve: Curve, most: int = FEW) -> Curve:
    steps, values = thin([step for step, _ in curve], most), thin([value for _, value in curve], most)
    return list(zip(steps, values, strict=True))
