"""The seconds of an optimizer step, predicted from what its operations are and two kinds of measured ceiling.

    seconds = sum over operations of  max(FLOPs / rate(shape, dtype), bytes / bandwidth(kind, dtype, size))
              + a fixed overhead for each call

Rates are measured once on this machine (`plan.calibrate`): products by shape and by how their matrices lie in memory,
passes by kind and by size, since small ones stay in a cache and tiny ones are all overhead.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.plan.trace import Key, Trace, key_flops, trace_step
from hanlin.plan.work import Work

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second.

    products[kind, dtype]: ((m, k, n), FLOP/s); passes[kind, dtype]: (bytes, seconds), ascending; attention[kind,
    dtype]: ((pairs, width), FLOP/s); overhead: seconds of a call beside its work; within[dtype]: how many times longer
    an operation takes within a step than alone, where caches and page tables are its own.
    """

    products: Mapping[tuple[str, str], Sequence[tuple[Shape, float]]]
    passes: Mapping[tuple[str, str], Sequence[tuple[int, float]]]
    attention: Mapping[tuple[str, str], Sequence[tuple[tuple[int, int], float]]]
    overhead: float
    within: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, object] = field(default_factory=dict)

    def seconds(self, key: Key) -> float:
        """Of one operation within a step, without its overhead."""
        kind, dtype, size = key
        return self.within.get(dtype, 1.0) * self._alone(kind, dtype, size)

    def _alone(self, kind: str, dtype: str, size: tuple[int, ...]) -> float:
        key = kind, dtype, size
        if kind.startswith("mm"):
            return key_flops(key) / _near(_found(self.products, kind, dtype), size)
        if kind.startswith("attention"):
            return key_flops(key) / _near(_found(self.attention, kind, dtype), size)
        return _between(_found(self.passes, kind, dtype), size[0])


@dataclass(frozen=True)
class Seconds:
    """total, and parts: by kind of operation ("overhead" besides); flops: of the step."""

    total: float
    parts: dict[str, float]
    flops: float


def step_seconds(config: ModelConfig, work: Work, rates: Rates) -> Seconds:
    """Predict one optimizer step of `work` on the machine of `rates`."""
    return price(trace_step(config, work), rates)


def price(done: Trace, rates: Rates) -> Seconds:
    """What counted work costs."""
    parts: dict[str, float] = defaultdict(float)
    for key, count in done.counts.items():
        parts[key[0]] += count * rates.seconds(key)
    parts["overhead"] = done.calls * rates.overhead
    return Seconds(sum(parts.values()), dict(parts), done.flops)


def _found(table: Mapping[tuple[str, str], Sequence], kind: str, dtype: str) -> Sequence:
    for key in ((kind, dtype), (kind, "fp32"), ("pointwise", "fp32")):
        if table.get(key):
            return table[key]
    raise HanlinError(f"This machine's rates know no {kind} in {dtype}; measure them again (`plan.calibrate`).")


def _near(points: Sequence[tuple[tuple[int, ...], float]], size: Sequence[int]) -> float:
    """The rate at a shape: those measured around it, weighed by their nearness in doublings; outside, the border's."""
    lows = [min(point[i] for point, _ in points) for i in range(len(size))]
    highs = [max(point[i] for point, _ in points) for i in range(len(size))]
    at = [math.log2(min(max(x, low), high)) for x, low, high in zip(size, lows, highs, strict=True)]
    weights = total = 0.0
    for point, rate in points:
        distance = sum((math.log2(p) - a) ** 2 for p, a in zip(point, at, strict=True))
        weight = 1.0 / (distance + 1e-3) ** 2
        weights += weight
        total += weight * math.log(rate)
    return math.exp(total / weights)


def _between(points: Sequence[tuple[int, float]], size: int) -> float:
    """Seconds at a size: on the line between the two measured beside it; outside, in proportion to the border's."""
    if size <= points[0][0]:
        return points[0][1]
    for (low, before), (high, after) in pairwise(points):
        if size <= high:
            share = (size - low) / (high - low)
            return before + share * (after - before)
    return points[-1][1] * size / points[-1][0]
