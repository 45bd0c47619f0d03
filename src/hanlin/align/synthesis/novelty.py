"""Is a text new? Exact and near repetition, by ROUGE-L (Lin 2004) as Self-Instruct filters with it.

    ROUGE-L(a, b) = 2 · LCS(a, b) / (|a| + |b|)        LCS: longest common subsequence, over words

A word is a run of letters and digits; a Chinese, Japanese or Korean character counts as a word. The subsequence is
counted bit by bit in one integer as long as the text (Hyyrö 2004): a few microseconds a pair, so that a pool of
thousands is compared in full.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

ALONE = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"  # characters that are words
WORD = re.compile(f"[{ALONE}]|[^\\W_{ALONE}]+")


def words(text: str) -> list[str]:
    """The text's words in one spelling (NFKC, no capitals), without punctuation."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L's F1 of two lists of words, 0 to 1; 0 where both are empty."""
    return 2 * common_subsequence(_places(a), len(a), b) / (len(a) + len(b)) if a or b else 0.0


def common_subsequence(places: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Length of the longest common subsequence. places: word -> bits of where it stands in the first, of `length`."""
    row = (1 << length) - 1  # a zero at i: the subsequence grows when the first text's word i is allowed
    full = row
    for word in other:
        found = row & places.get(word, 0)
        row = ((row + found) | (row - found)) & full
    return length - row.bit_count()


class Pool:
    """Texts that are known. `repeats(text)` says which of them a new one repeats."""

    def __init__(self, texts: Iterable[str] = (), *, near: float = 0.7) -> None:
        """near: ROUGE-L from which two texts count as the same; above 1, only equal words do."""
        self.near = near
        self._exact: dict[tuple[str, ...], str] = {}
        self._known: list[tuple[dict[str, int], int, str]] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """From now on this text is known."""
        spoken = words(text)
        if self._exact.setdefault(tuple(spoken), text) is text and self.near <= 1:
            self._known.append((_places(spoken), len(spoken), text))

    def repeats(self, text: str) -> str | None:
        """A known text that says the same: equal words, or ROUGE-L of at least `near`. None: it is new."""
        spoken = words(text)
        if (same := self._exact.get(tuple(spoken))) is not None:
            return same
        for places, length, known in self._known:
            total = length + len(spoken)
            if 2 * min(length, len(spoken)) < self.near * total:  # even a whole overlap would not do
                continue
            if 2 * common_subsequence(places, length, spoken) >= self.near * total:
                return known
        return None


def _places(spoken: Sequence[str]) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, word in enumerate(spoken):
        places[word] = places.get(word, 0) | 1 << place
    return places
