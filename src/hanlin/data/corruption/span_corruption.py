"""Span corruption: spans are cut out and replaced by sentinels, the target names each sentinel and what stood there.

    text     Thank you for inviting me to your party last week
    source   Thank you <X> me to your party <Y> week
    target   <X> for inviting <Y> last <Z>                        <Z> marks the end

T5 (arXiv:1910.10683, section 3.1.4, figure 2): 15 % of the tokens in spans of 3 on average. How many tokens and spans
there are depends on the length of the text alone, so rows of one length give sources and targets of one length.
"""

from collections.abc import Sequence

import numpy as np

from hanlin.core.errors import HanlinError


def count_noise(length: int, *, density: float = 0.15, mean: float = 3.0) -> tuple[int, int]:
    """(tokens cut out, spans) of a text of `length` >= 2 tokens: at least one token goes and one stays."""
    if not 0 < density < 1 or mean < 1:
        raise HanlinError(f"Noise density {density}, mean span {mean}; expected between 0 and 1, and at least 1.")
    if length < 2:
        raise HanlinError(f"A text of {length} tokens has nothing to cut out of; expected at least 2.")
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean), 1), length - noise + 1)


def draw_spans(
    length: int, chance: np.random.Generator, *, density: float = 0.15, mean: float = 3.0
) -> list[tuple[int, int]]:
    """[start, stop) of the spans, ascending, at least one kept token between two: uniform over all such choices."""
    noise, count = count_noise(length, density=density, mean=mean)
    sizes = _parts(noise, count, chance)
    # kept text before, between and after the spans: the outer two may be empty, so they get one token more, lent
    gaps = _parts(length - noise + 2, count + 1, chance)
    gaps[0] -= 1
    starts = np.cumsum(gaps[:-1]) + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return [(int(start), int(start + size)) for start, size in zip(starts, sizes, strict=True)]


def corrupt_spans(
    ids: np.ndarray, spans: Sequence[tuple[int, int]], sentinels: Sequence[int], *, closing: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) int64. sentinels: ids in the order of use (T5's extra_id_0, extra_id_1, … count downwards).

    closing: end the target with one more sentinel, as in the paper; T5's released checkpoints were trained without.
    """
    needed = len(spans) + closing
    if needed > len(sentinels):
        raise HanlinError(
            f"{len(spans)} spans need {needed} sentinels, there are {len(sentinels)}: give more, or shorter texts."
        )
    source: list[np.ndarray] = []
    target: list[np.ndarray] = []
    at = 0
    for (start, stop), sentinel in zip(spans, sentinels, strict=False):
        source += [ids[at:start], np.array([sentinel])]
        target += [np.array([sentinel]), ids[start:stop]]
        at = stop
    source.append(ids[at:])
    if closing:
        target.append(np.array([sentinels[len(spans)]]))
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *source]).astype(np.int64), np.concatenate([empty, *target]).astype(np.int64)


def corrupted_lengths(
    length: int, *, density: float = 0.15, mean: float = 3.0, closing: bool = True
) -> tuple[int, int]:
    """(source, target) lengths that a text of `length` tokens gives."""
    noise, spans = count_noise(length, density=density, mean=mean)
    return length - noise + spans, noise + spans + closing


def longest_text(source_length: int, *, density: float = 0.15, mean: float = 3.0) -> int:
    """How long a text may be whose source fits into `source_length` tokens: T5's 512 hold a text of 568 (and an end
    token). Raises `HanlinError` where not even 2 tokens fit."""
    length = 2
    if corrupted_lengths(length, density=density, mean=mean)[0] > source_length:
        raise HanlinError(f"A source of {source_length} tokens holds no text with a span cut out; expected at least 2.")
    while corrupted_lengths(length + 1, density=density, mean=mean)[0] <= source_length:
        length += 1
    return length


def _parts(total: int, count: int, chance: np.random.Generator) -> np.ndarray:
    """`total` as an ordered sum of `count` positive whole numbers, uniform over all such sums."""
    cuts = np.sort(chance.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
