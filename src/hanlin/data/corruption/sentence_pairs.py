"""Next-sentence prediction: does the second text follow the first? (BERT, arXiv:1810.04805, section 3.1, task 2.)

    ids        [CLS] a a a [SEP] b b [SEP]
    segments     0   0 0 0   0   1 1   1        label 0: b follows a · 1: b is from another document

Half of the pairs are real. A false second text is as long as the real one was, so that length tells nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hanlin.core.errors import HanlinError

FOLLOWS, ELSEWHERE = 0, 1

Elsewhere = Callable[[np.random.Generator, int], np.ndarray]  # (chance, n) -> at most n tokens of another document


@dataclass(frozen=True)
class Pair:
    """Two texts, (n,) ids each, and `FOLLOWS` or `ELSEWHERE`."""

    first: np.ndarray
    second: np.ndarray
    label: int


def draw_pair(
    sentences: Sequence[np.ndarray], elsewhere: Elsewhere, chance: np.random.Generator, *, false: float = 0.5
) -> Pair:
    """Cut a text between two of its sentences (a text of one sentence: between two tokens) and, with probability
    `false`, exchange what follows for something from elsewhere. Raises `HanlinError` for a text of fewer than 2 tokens.
    """
    ids = np.concatenate(sentences) if sentences else np.empty(0, dtype=np.int64)
    if len(ids) < 2:
        raise HanlinError(f"A text of {len(ids)} tokens cannot be cut into two; expected at least 2.")
    borders = np.cumsum([len(part) for part in sentences])[:-1]
    if not len(borders):
        borders = np.arange(1, len(ids))
    cut = int(chance.choice(borders))
    if chance.random() >= false:
        return Pair(ids[:cut], ids[cut:], FOLLOWS)
    return Pair(ids[:cut], elsewhere(chance, len(ids) - cut), ELSEWHERE)


def join_pair(pair: Pair, *, cls_id: int, sep_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, segments, which tokens are text and not markers), each (len(first) + len(second) + 3,)."""
    ids = np.concatenate([[cls_id], pair.first, [sep_id], pair.second, [sep_id]]).astype(np.int64)
    border = len(pair.first) + 2
    segments = (np.arange(len(ids)) >= border).astype(np.int64)
    text = np.ones(len(ids), dtype=bool)
    text[[0, border - 1, -1]] = False
    return ids, segments, text
