"""What needs no neural network: a byte n-gram model and xz, trained on the same text, in bits per byte.

The n-gram model is interpolated modified Kneser-Ney (Chen & Goodman 1999) over bytes:

    p_n(b | c) = max(count(cb) - D, 0) / count(c·)  +  left(c) · p_{n-1}(b | c without its first byte)

Below the highest order a count is of *different bytes before it*, not of occurrences; D is one of three discounts, by
the count; `left(c)` is what the discounts took away, so every row of probabilities sums to one. The lowest order is
mixed with the uniform 1/256. A context that was never seen has the probabilities of the next shorter one.

An n-gram is an integer of n bytes, most significant first: one sort of the longest gives all shorter ones in order.
"""

import lzma
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hanlin.core.errors import HanlinError

Keys = NDArray[np.uint64]
END = 0  # the byte that ends a document; it costs bits and counts for no byte of text
PART = 1 << 20  # bytes whose probabilities are looked up at once


@dataclass(frozen=True)
class _Order:
    """n-grams of one length, ascending, with what each contributes: grams (g,), share (g,) = (count - D) / count(c·);
    contexts (c,), left (c,)."""

    grams: Keys
    share: NDArray[np.float64]
    contexts: Keys
    left: NDArray[np.float64]


class ByteNgram:
    """`ByteNgram.train(texts)`, then `.bits_per_byte(other texts)`.

    Memory is about 25 bytes for each byte of training text; 17 MB train in under two seconds on one core.
    """

    def __init__(self, orders: list[_Order]) -> None:
        self._orders = orders

    @property
    def order(self) -> int:
        return len(self._orders)

    @classmethod
    def train(cls, texts: Iterable[str | bytes], *, order: int = 6) -> "ByteNgram":
        """Count the n-grams of documents. order: bytes of the longest, context and prediction together, 1 to 8."""
        if not 1 <= order <= 8:
            raise HanlinError(f"The order of the byte n-gram model is {order}; it must be between 1 and 8.")
        text = join_documents(texts)
        longest = np.sort(_windows(np.concatenate([text, np.full(order - 1, END, np.uint8)]), order))
        # grams[n]: every different n-gram; counts[n]: how often it occurs
        grams: list[Keys] = []
        counts: list[NDArray[np.int64]] = []
        for n in range(order, 0, -1):
            found, count = _run_lengths(longest >> _bits(8 * (order - n)))
            grams.insert(0, found)
            counts.insert(0, count)
        orders = []
        for n in range(1, order + 1):
            if n < order:  # how many different bytes stand before it
                suffixes = np.sort(grams[n] & _mask(n))
                found, count = _run_lengths(suffixes)
            else:
                found, count = grams[n - 1], counts[n - 1]
            orders.append(_discount(found, count))
        return cls(orders)

    def bits_per_byte(self, texts: Iterable[str | bytes]) -> float:
        """Bits of all documents with their ends, divided by the bytes of their text."""
        text = join_documents(texts)
        ends = int((text == END).sum())
        bits = 0.0
        reach = self.order - 1
        padded = np.concatenate([np.full(reach, END, np.uint8), text])
        for start in range(0, len(text), PART):
            bits -= float(np.log2(self.probabilities(padded[start : start + PART + reach])).sum())
        return bits / (len(text) - ends)

    def probabilities(self, text: NDArray[np.uint8]) -> NDArray[np.float64]:
        """text (n,) bytes -> (n - order + 1,): the probability of each byte after its first order - 1."""
        reach = self.order - 1
        total = np.full(len(text) - reach, 1.0 / 256)
        for n, part in enumerate(self._orders, start=1):
            keys = _windows(text[reach - n + 1 :], n)
            left = _look_up(part.contexts, part.left, keys >> _bits(8), missing=1.0)
            total = _look_up(part.grams, part.share, keys, missing=0.0) + left * total
        return total


def xz_bits_per_byte(train: Iterable[str | bytes], test: Iterable[str | bytes]) -> float:
    """What xz needs for the test text when it has just read the training text: (size(train + test) - size(train)) * 8 /
    bytes of test. The window spans everything, up to the 1.5 GB that the format allows."""
    before, after = join_documents(train).tobytes(), join_documents(test).tobytes()
    bytes_of_text = len(after) - after.count(END)
    window = min(max(1 << 16, len(before) + len(after)), 1536 << 20)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]

    def size(text: bytes) -> int:
        return len(lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=filters))

    with ThreadPoolExecutor(2) as pool:  # liblzma runs without the interpreter's lock
        both, alone = pool.map(size, (before + after, before))
    return (both - alone) * 8 / bytes_of_text


def join_documents(texts: Iterable[str | bytes]) -> NDArray[np.uint8]:
    """Documents as one array of bytes, each followed by `END`. A zero byte inside a text is taken for a space."""
    if isinstance(texts, str | bytes):
        texts = [texts]
    parts = [text.encode() if isinstance(text, str) else text for text in texts]
    whole = b"".join(part.replace(b"\0", b" ") + bytes([END]) for part in parts if part)
    if not whole:
        raise HanlinError("There is no text: every document is empty.")
    return np.frombuffer(whole, dtype=np.uint8)


def _discount(grams: Keys, counts: NDArray[np.int64]) -> _Order:
    discounts = _discounts(counts)
    contexts, sizes = _run_lengths(grams >> _bits(8))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    taken = discounts[np.minimum(counts, 3)]
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    return _Order(grams, (counts - taken) / np.repeat(totals, sizes), contexts, np.add.reduceat(taken, starts) / totals)


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(4,): the discounts of counts 0, 1, 2 and more, estimated from how many n-grams have each of the counts 1 to 4
    (Chen & Goodman 1999, eq. 26); 0.75 at most the count where a text is too small to tell."""
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array([0.0, 0.75, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.array([0.0, *(min(max(d, 0.05), k) for k, d in zip((0.95, 1.95, 2.95), found, strict=True))])


def _windows(text: NDArray[np.uint8], n: int) -> Keys:
    """Every n bytes that follow each other, as integers: (len(text) - n + 1,)."""
    size = len(text) - n + 1
    keys = np.zeros(size, np.uint64)
    for offset in range(n):
        keys <<= _bits(8)
        keys |= text[offset : offset + size]
    return keys


def _run_lengths(ascending: Keys) -> tuple[Keys, NDArray[np.int64]]:
    """Different values of a sorted array and how often each occurs."""
    first = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    return ascending[first], np.diff(np.append(first, len(ascending)))


def _look_up(keys: Keys, values: NDArray[np.float64], wanted: Keys, *, missing: float) -> NDArray[np.float64]:
    order = np.argsort(wanted)  # neighbours in the table stand together: several times faster than a random walk
    ascending = wanted[order]
    place = np.minimum(np.searchsorted(keys, ascending), len(keys) - 1)
    out = np.empty(len(wanted))
    out[order] = np.where(keys[place] == ascending, values[place], missing)
    return out


def _bits(count: int) -> np.uint64:
    return np.uint64(count)


def _mask(n: int) -> np.uint64:
    return np.uint64((1 << (8 * n)) - 1) if n < 8 else np.uint64(2**64 - 1)
