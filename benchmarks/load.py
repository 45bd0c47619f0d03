"""Requests that arrive over time, and what came of them: the work of `bench_engine.py` beyond one prompt at a time."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arrival:
    """A request: seconds after the start, its prompt, how many tokens it wants."""

    at: float
    prompt: list[int]
    new: int


@dataclass
class Watch:
    """When the tokens of a request came, in seconds of `time.perf_counter`."""

    times: list[float] = field(default_factory=list)

    def __call__(self, event: object) -> None:  # `on_event` of the engine
        if isinstance(event, Exception):
            raise event
        self.times += [time.perf_counter()] * len(getattr(event, "token_ids", ()))

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def ragged(
    count: int, window: float, vocabulary: int, *, prompts: tuple[int, int] = (64, 512),
    outputs: tuple[int, int] = (32, 256), seed: int = 0,
) -> list[Arrival]:  # fmt: skip
    """`count` requests that arrive in about `window` seconds (Poisson), lengths uniform in the ranges."""
    rng = random.Random(seed)
    found, at = [], 0.0
    for _ in range(count):
        prompt = [rng.randrange(10, vocabulary) for _ in range(rng.randint(*prompts))]
        found.append(Arrival(at, prompt, rng.randint(*outputs)))
        at += rng.expovariate(count / window)
    return found


def play(arrivals: Sequence[Arrival], submit: Callable[[Arrival], None]) -> float:
    """Hand every request over when it arrives; returns when the play began."""
    began = time.perf_counter()
    for arrival in arrivals:
        time.sleep(max(0.0, began + arrival.at - time.perf_counter()))
        submit(arrival)
    return began


def percentile(values: Sequence[float], p: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))]


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    return {
        "p50": round(1e3 * statistics.median(values), 1),
        "p99": round(1e3 * percentile(values, 99), 1),
        "max": round(1e3 * max(values), 1),
    }
