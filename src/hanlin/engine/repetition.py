"""How much a text repeats itself: what the penalties are for, measured.

    seq-rep-n    1 - different n-grams / n-grams of one text (arXiv:1908.04319)
    distinct-n   different n-grams / n-grams of many texts together (arXiv:1510.03055)
    longest      the longest run of units that stands there twice
    loop share   the part of the text that lies in a loop: a piece which comes three times or more, end to end

A loop is what users call a broken record, or 复读机: "I see. I see. I see. I see." A text that ends inside one will
hardly leave it. Works on token ids and on text; the units of a text are words, single Chinese characters, kana, and
punctuation marks, so that English and Chinese are measured with the same yardstick.
"""

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Chinese: a character is a unit
UNIT = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")
LONGEST_PERIOD = 512  # units; each period costs one pass over the text


@dataclass(frozen=True)
class Loop:
    """Units start to end (exclusive), in which each equals the one `period` before it."""

    start: int
    end: int
    period: int


@dataclass(frozen=True)
class Repetition:
    """The measures of one text. longest: units; loop_share: 0 to 1; ends_in_loop: its last unit lies in a loop."""

    units: int
    seq_rep_4: float
    distinct_2: float
    longest: int
    loop_share: float
    ends_in_loop: bool


def measure(text: str | Sequence[int]) -> Repetition:
    """All measures of a text, or of token ids."""
    units = split_units(text) if isinstance(text, str) else list(text)
    loops = find_loops(units)
    return Repetition(
        units=len(units),
        seq_rep_4=seq_rep(units, 4),
        distinct_2=distinct([units], 2),
        longest=longest_repeat(units),
        loop_share=loop_share(units),
        ends_in_loop=any(loop.end == len(units) for loop in loops),
    )


def split_units(text: str) -> list[str]:
    """Words, single Chinese characters and kana, and punctuation marks; blanks are dropped."""
    return UNIT.findall(text)


def seq_rep(units: Sequence[Hashable], n: int = 4) -> float:
    """The part of the n-grams that stood there before: 0 for a text that never repeats, or is shorter than n."""
    total = len(units) - n + 1
    return 1 - len(_ngrams(units, n)) / total if total > 0 else 0.0


def distinct(texts: Iterable[Sequence[Hashable]], n: int = 2) -> float:
    """Different n-grams over all n-grams of the texts, which do not reach across them; 1 where there are none."""
    different: set[tuple[Hashable, ...]] = set()
    total = 0
    for units in texts:
        different |= _ngrams(units, n)
        total += max(0, len(units) - n + 1)
    return len(different) / total if total else 1.0


def longest_repeat(units: Sequence[Hashable]) -> int:
    """Units of the longest run that stands at two places, which may overlap.

    Runs of 2^k units get numbers by pairs of numbers of 2^(k-1); a run of any length is two of those, overlapping.
    """
    names = [_numbers(units)]
    while len(names[-1]) > (half := 2 ** (len(names) - 1)):
        names.append(_pairs(names[-1][:-half], names[-1][half:]))

    def repeats(length: int) -> bool:
        k = length.bit_length() - 1
        count = len(units) - length + 1
        runs = _pairs(names[k][:count], names[k][length - 2**k :][:count])
        return len(np.unique(runs)) < count

    known, too_long = 0, max(1, len(units))
    while too_long - known > 1:
        middle = (known + too_long) // 2
        known, too_long = (middle, too_long) if repeats(middle) else (known, middle)
    return known


def find_loops(units: Sequence[Hashable], *, times: int = 3, least: int = 8) -> list[Loop]:
    """Stretches that are one piece, `times` or more in a row, and at least so many units long; in their order.

    A stretch is named once, by its shortest period. Periods above `LONGEST_PERIOD` are not looked for.
    """
    numbers = _numbers(units)
    size = len(numbers)
    found: list[Loop] = []
    for period in range(1, min(LONGEST_PERIOD, size // times) + 1):
        same = np.zeros(size - period + 2, dtype=np.int8)  # framed by zeros
        same[1:-1] = numbers[period:] == numbers[:-period]
        edges = np.flatnonzero(np.diff(same)).reshape(-1, 2)  # [from, to) of each run of equal pairs
        long = edges[edges[:, 1] - edges[:, 0] + period >= max(times * period, least)]
        for start, end in long.tolist():
            loop = Loop(start, end + period, period)
            if not any(other.start <= loop.start and loop.end <= other.end for other in found):
                found.append(loop)
    return sorted(found, key=lambda loop: loop.start)


def loop_share(units: Sequence[Hashable], *, times: int = 3, least: int = 8) -> float:
    """The part of the units that lies in a loop, 0 to 1."""
    inside = np.zeros(len(units), dtype=bool)
    for loop in find_loops(units, times=times, least=least):
        inside[loop.start : loop.end] = True
    return float(inside.mean()) if len(units) else 0.0


def _ngrams(units: Sequence[Hashable], n: int) -> set[tuple[Hashable, ...]]:
    return set(zip(*(units[i:] for i in range(n)), strict=False))


def _numbers(units: Sequence[Hashable]) -> NDArray[np.int64]:
    table: dict[Hashable, int] = {}
    return np.array([table.setdefault(unit, len(table)) for unit in units], dtype=np.int64)


def _pairs(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """Equal numbers for equal pairs."""
    joined = left * (int(right.max(initial=0)) + 1) + right
    return np.unique(joined, return_inverse=True)[1].astype(np.int64)
