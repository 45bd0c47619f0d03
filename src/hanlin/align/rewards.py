"""Rewards are plain callables: samples in, a number each out. Rules here; models and judges beside (`reward_model`).

    exact     the answer is the expected one                     {"answer": ...} of the prompt's row
    number    the last number of the answer is the expected one
    regex     the answer matches a pattern (a format)
    overlong  0 up to a length, then falling to -1 at the limit (DAPO, arXiv:2503.14476 eq. 13)
    function  any function of yours: module:function

`RewardSet` adds several up by weight and believes none of them: too few values, a NaN or an exception is an error that
names the reward; None means that a reward does not apply to a sample and adds nothing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hanlin.align.samples import Reward, Sample
from hanlin.core.errors import HanlinError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Exact:
    """1 where the answer is the expected text, white space at its ends aside; else 0. column: of the prompt's row."""

    column: str = "answer"

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(s.text.strip() == str(expected(s, self.column)).strip()) for s in samples]


@dataclass(frozen=True)
class Number:
    """1 where the last number of the answer equals the expected one (12, 12.0 and 24/2 are equal), else 0."""

    column: str = "answer"

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(last_number(s.text) == _as_number(expected(s, self.column), s)) for s in samples]


@dataclass(frozen=True)
class Pattern:
    """1 where the whole answer matches the regular expression, else 0."""

    pattern: str

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        compiled = re.compile(self.pattern, re.DOTALL)
        return [float(compiled.fullmatch(s.text.strip()) is not None) for s in samples]


@dataclass(frozen=True)
class Overlong:
    """0 for at most limit - margin tokens, then falling to -1 at `limit`; an answer that was cut counts as -1."""

    limit: int
    margin: int

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [-1.0 if s.finish == "length" else overlong(s.length, self.limit, self.margin) for s in samples]


def overlong(length: int, limit: int, margin: int) -> float:
    """DAPO's soft penalty of a length in tokens, between 0 and -1."""
    return max(-1.0, min(0.0, (limit - margin - length) / margin)) if margin else float(-(length > limit))


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; thousands' commas are passed over."""
    found = NUMBER.findall(text)
    try:
        return Fraction(found[-1].replace(",", "")) if found else None
    except (ValueError, ZeroDivisionError):
        return None


def expected(sample: Sample, column: str) -> Any:
    """What the prompt's row says is right."""
    if column not in sample.meta:
        known = ", ".join(sample.meta) or "nothing"
        raise HanlinError(f"Prompt {sample.prompt.number} has no column {column!r} to compare with; it has {known}.")
    return sample.meta[column]


@dataclass(frozen=True)
class Scores:
    """total: of each sample, by weight; by_name: what each reward said (None: not applicable); steps: of a reward that
    judges the steps of an answer, by weight, else None; ends: the tokens at which they end, where it says that."""

    total: list[float]
    by_name: dict[str, list[float | None]]
    steps: list[list[float]] | None
    ends: list[list[int]] | None = None


class RewardSet:
    """Several rewards by name and weight. The first is the one that evaluations report."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float] | None = None) -> None:
        if not rewards:
            raise HanlinError("There is no reward: give at least one.")
        self.rewards = dict(rewards)
        self.weights = dict.fromkeys(rewards, 1.0) | dict(weights or {})

    @property
    def main(self) -> str:
        return next(iter(self.rewards))

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        total = [0.0] * len(samples)
        by_name: dict[str, list[float | None]] = {}
        steps: list[list[float]] | None = None
        ends: list[list[int]] | None = None
        for name, reward in self.rewards.items():
            weight, values = self.weights[name], _asked(name, reward, samples)
            by_name[name] = [sum(value) if isinstance(value, list) else value for value in values]
            for place, value in enumerate(by_name[name]):
                total[place] += weight * value if value is not None else 0.0
            if any(isinstance(value, list) for value in values):
                if steps is not None:
                    raise HanlinError(f"The reward {name} judges steps, and another one does too; one can.")
                steps = [[weight * float(v) for v in value] if isinstance(value, list) else [] for value in values]
                tell = getattr(reward, "ends", None)
                ends = None if tell is None else tell(samples)
        return Scores(total, by_name, steps, ends)


def _asked(name: str, reward: Reward, samples: Sequence[Sample]) -> list[float | list[float] | None]:
    """What a reward says, checked."""
    try:
        values = list(reward(samples))
    except HanlinError:
        raise
    except Exception as error:
        raise HanlinError(
            f"The reward {name!r} failed on {len(samples)} samples: {type(error).__name__}: {error}."
        ) from error
    if len(values) != len(samples):
        raise HanlinError(
            f"The reward {name!r} was asked about {len(samples)} samples and returned {len(values)} values; it must "
            "return one for each, None where it does not apply."
        )
    checked: list[float | list[float] | None] = []
    for value, sample in zip(values, samples, strict=True):
        numbers = value if isinstance(value, list | tuple) else [] if value is None else [value]
        try:
            plain = [float(number) for number in numbers]
        except (TypeError, ValueError) as error:
            raise HanlinError(f"The reward {name!r} returned {value!r} for {_shown(sample)}, no number.") from error
        if not all(math.isfinite(number) for number in plain):
            raise HanlinError(
                f"The reward {name!r} returned {value!r} for {_shown(sample)}; rewards are finite numbers."
            )
        checked.append(plain if isinstance(value, list | tuple) else plain[0] if plain else None)
    return checked


def _shown(sample: Sample) -> str:
    text = sample.text if len(sample.text) <= 60 else sample.text[:57] + "..."
    return f"the answer {text!r} to prompt {sample.prompt.number}"


def _as_number(value: Any, sample: Sample) -> Fraction:
    found = last_number(str(value))
    if found is None:
        raise HanlinError(f"The expected answer {value!r} of prompt {sample.prompt.number} is no number.")
    return found
