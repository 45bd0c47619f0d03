"""BART's noise (arXiv:1910.13461, section 2.2): five ways to spoil a document that the decoder then writes out whole.

    document               A B C . D E .
    token masking          A _ C . _ E .        some tokens become [MASK]
    token deletion         A C . E .            where something is missing is not shown
    text infilling         A _ . D _ E .        a span becomes one [MASK]; of length 0 it is inserted
    sentence permutation   D E . A B C .
    document rotation      C . D E . A B

`Noise` composes them: the published model uses infilling of 30 % with sentence permutation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hanlin.core.errors import HanlinError


def mask_some(ids: np.ndarray, chance: np.random.Generator, *, rate: float, mask_id: int) -> np.ndarray:
    """round(rate * n) tokens become `mask_id`."""
    spoiled = ids.copy()
    spoiled[chance.permutation(len(ids))[: _share(rate, len(ids))]] = mask_id
    return spoiled


def delete_some(ids: np.ndarray, chance: np.random.Generator, *, rate: float) -> np.ndarray:
    """round(rate * n) tokens are gone, of two or more at least one stays."""
    gone = min(_share(rate, len(ids)), max(len(ids) - 1, 0))
    return np.delete(ids, chance.permutation(len(ids))[:gone])


def draw_span_lengths(tokens: int, chance: np.random.Generator, *, mean: float = 3.0) -> np.ndarray:
    """Lengths ~ Poisson(mean) that together take `tokens` tokens; the last is cut to fit. Spans of length 0 insert a
    mask; so that a text never grows, there are no more spans than tokens taken (the surplus of empty ones is left out,
    which happens in very short texts only). mean: at least 0.5."""
    if mean < 0.5:
        raise HanlinError(f"A mean span of {mean}; expected at least 0.5.")
    lengths: list[int] = []
    left = tokens
    while left:
        lengths.append(min(int(chance.poisson(mean)), left))
        left -= lengths[-1]
    drawn = np.array(lengths, dtype=np.int64)
    room = tokens - int((drawn > 0).sum())
    return drawn[(drawn > 0) | (np.cumsum(drawn == 0) <= room)]


def infill(
    ids: np.ndarray, lengths: Sequence[int] | np.ndarray, chance: np.random.Generator, *, mask_id: int
) -> np.ndarray:
    """Each span of `lengths` becomes one `mask_id`; the others keep their order.

    Where the spans stand is uniform over all ways to interleave them with the kept tokens. Raises `HanlinError` for
    spans that are together longer than the text.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    kept = len(ids) - int(sizes.sum())
    if kept < 0:
        raise HanlinError(f"Spans of {int(sizes.sum())} tokens in a text of {len(ids)}.")
    takes = np.ones(kept + len(sizes), dtype=np.int64)  # how many tokens of the text stand behind each place
    holes = np.sort(chance.permutation(len(takes))[: len(sizes)])
    takes[holes] = sizes
    starts = np.cumsum(takes) - takes
    masked = np.zeros(len(takes), dtype=bool)
    masked[holes] = True
    spoiled = np.full(len(takes), mask_id, dtype=ids.dtype)
    spoiled[~masked] = ids[starts[~masked]]
    return spoiled


def permute_sentences(sentences: Sequence[np.ndarray], chance: np.random.Generator) -> np.ndarray:
    """The sentences of a document, one after the other in random order."""
    if not sentences:
        return np.empty(0, dtype=np.int64)
    return np.concatenate([sentences[place] for place in chance.permutation(len(sentences))])


def rotate(ids: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """The document begins with a token drawn uniformly; what stood before it follows the end."""
    return np.roll(ids, -int(chance.integers(0, max(len(ids), 1))))


@dataclass(frozen=True)
class Noise:
    """Shares of tokens that are infilled, masked and deleted, mean length of an infilled span, and the probabilities
    with which a document's sentences are permuted and it is rotated. The default is what BART was trained with."""

    infill: float = 0.3
    span: float = 3.0
    mask: float = 0.0
    delete: float = 0.0
    permute: float = 1.0
    rotate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("infill", "mask", "delete", "permute", "rotate"):
            if not 0 <= getattr(self, name) <= 1:
                raise HanlinError(f"Noise.{name} is {getattr(self, name)}; expected 0 to 1.")
        if self.span < 0.5:
            raise HanlinError(f"Noise.span is {self.span}; expected at least 0.5.")

    def apply(self, sentences: Sequence[np.ndarray], chance: np.random.Generator, *, mask_id: int) -> np.ndarray:
        """The spoiled document, at most as long as the original: sentences, then tokens, then rotation."""
        permuted = chance.random() < self.permute
        ids = permute_sentences(sentences, chance) if permuted else np.concatenate([*sentences])
        if self.mask:
            ids = mask_some(ids, chance, rate=self.mask, mask_id=mask_id)
        if self.delete:
            ids = delete_some(ids, chance, rate=self.delete)
        if self.infill:
            lengths = draw_span_lengths(_share(self.infill, len(ids)), chance, mean=self.span)
            ids = infill(ids, lengths, chance, mask_id=mask_id)
        return rotate(ids, chance) if chance.random() < self.rotate else ids


def _share(rate: float, count: int) -> int:
    if not 0 <= rate <= 1:
        raise HanlinError(f"A rate of {rate}; expected 0 to 1.")
    return round(rate * count)
