"""What speaks against a token: the tokens that stand before it.

    repetition           arXiv:1909.05858: logits of tokens that occurred are divided by it, or multiplied if negative
    presence, frequency  subtracted once, and as often as the token occurred in the output
    no-repeat n-gram     arXiv:1705.04304: what would complete an n-gram a second time is forbidden
    bad words            what would complete one of these sequences is forbidden
    DRY                  multiplier * base^(n - allowed) is subtracted from what would prolong a repeated run of n

DRY ("don't repeat yourself") looks for the longest run of tokens at the end that stood earlier, too:

    … the cat sat on │ the mat, … the cat sat on │ ?          n = 4 for "the"

A `History` keeps what these need while its sequence grows, so that a step costs what the step adds, not the prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hanlin.engine.types import SamplingParams

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Words = dict[int, dict[tuple[int, ...], list[int]]]

LOG_MOST = 60.0  # DRY's power stays below e^60: a run of thousands overflows nothing


def penalise_repetition(logits: Tensor, penalty: Tensor) -> Tensor:
    """The logits of tokens that occurred, after the penalty; of one shape."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def occurrence_penalties(times: Ints, presence: float, frequency: float) -> Floats:
    """What is subtracted from tokens that occurred so often in the output."""
    return presence * (times > 0) + frequency * times


def ngram_bans(ids: Ints, n: int) -> Ints:
    """Tokens that would complete an n-gram which stands in ids already. n = 1: every token that stands there."""
    if n < 1 or len(ids) < n:
        return ids[:0]
    ends = np.arange(n - 1, len(ids))  # where an n-gram may end
    for back in range(1, n):
        ends = ends[ids[ends - back] == ids[len(ids) - back]]
    return np.unique(ids[ends])


def index_words(words: Iterable[Sequence[int]]) -> Words:
    """Sequences by the length of all but their last token, and by these tokens."""
    index: Words = {}
    for word in words:
        index.setdefault(len(word) - 1, {}).setdefault(tuple(word[:-1]), []).append(word[-1])
    return index


def word_bans(ids: Sequence[int], drafted: Sequence[int], words: Words) -> list[int]:
    """Tokens that would complete one of the words behind ids and drafted."""
    longest = max(words, default=0)
    tail = (*ids[max(0, len(ids) - longest) :], *drafted)
    found = [by.get(tail[len(tail) - length :], []) for length, by in words.items() if length <= len(tail)]
    return sorted({token for tokens in found for token in tokens})


def repeated_runs(ids: Sequence[int], breakers: frozenset[int] = frozenset()) -> Ints:
    """How many tokens before and at each place equal those at the end: (n,) ids -> (n - 1,), no run with a breaker.

    The Z algorithm from behind: time grows with the length, however much repeats.
    """
    back = ids[::-1]
    size = len(back)
    limit = next((i for i, token in enumerate(back) if token in breakers), size)
    z = [0] * size
    left = right = 0
    for i in range(1, size):
        length = min(right - i, z[i - left]) if i < right else 0
        while i + length < size and back[i + length] == back[length]:
            length += 1
        z[i] = length
        if i + length > right:
            left, right = i, i + length
    return np.minimum(np.array(z[:0:-1], dtype=np.int64), limit)


def prolong_runs(runs: Ints, ids: Ints, breakers: frozenset[int] = frozenset()) -> Ints:
    """`repeated_runs` of ids from those of ids without its last token."""
    if ids[-1] in breakers:
        return np.zeros(len(ids) - 1, dtype=np.int64)
    longer = np.ones(len(ids) - 1, dtype=np.int64)
    longer[1:] += runs
    return longer * (ids[:-1] == ids[-1])


def dry_penalties(ids: Ints, runs: Ints, params: SamplingParams) -> tuple[Ints, Floats]:
    """Tokens that would prolong a repeated run, and what is subtracted from their logits."""
    places = np.flatnonzero(runs >= params.dry_allowed_length)
    places = places[np.argsort(runs[places], kind="stable")]
    longest = dict(zip(ids[places + 1].tolist(), runs[places].tolist(), strict=True))  # the last one is the longest
    for breaker in params.dry_breakers:
        longest.pop(breaker, None)
    over = np.array(list(longest.values()), dtype=np.float64) - params.dry_allowed_length
    power = np.exp(np.minimum(over * np.log(params.dry_base), LOG_MOST))
    return np.array(list(longest), dtype=np.int64), params.dry_multiplier * power


def forbid(logits: Tensor, allowed: Tensor) -> Tensor:
    """Forbid what has no bit: allowed (rows, ceil(V / 32)) int32, bit t % 32 of word t // 32 (little-endian)."""
    bits = (torch.arange(256, device=logits.device)[:, None] >> torch.arange(8, device=logits.device)) & 1
    added = bits.to(logits.dtype).log()  # (256, 8): what a byte adds; looking up is 50 times faster than masking
    rows = F.embedding(allowed.contiguous().view(torch.uint8).int(), added).flatten(1)  # (rows, 32 * words)
    return logits + rows[:, : logits.shape[-1]]


@dataclass(frozen=True)
class Seen:
    """ids: all tokens; distinct: each that occurs; said, times: each of the output, and how often; runs: of DRY.
    What the parameters don't ask for is empty."""

    ids: Ints
    distinct: Ints
    said: Ints
    times: Ints
    runs: Ints


class History:
    """What `Seen` holds, kept up for a sequence that only grows. prompt: tokens that are not output."""

    def __init__(self, params: SamplingParams, prompt: int) -> None:
        self._prompt, self._size = prompt, 0
        self._breakers = frozenset(params.dry_breakers)
        self._dry = params.dry_multiplier > 0
        self._wants_ids = self._dry or params.no_repeat_ngram > 0
        self._wants_all = params.repetition_penalty != 1
        self._wants_output = bool(params.presence_penalty or params.frequency_penalty)
        self._ids, self._all, self._output = _Grown(), _Tally(), _Tally()
        self._runs = np.zeros(0, dtype=np.int64)

    def follow(self, ids: Sequence[int]) -> None:
        """Take in what was appended since the last time."""
        new, known = ids[self._size :], self._size
        self._size = len(ids)
        if self._wants_all:
            self._all.add(new)
        if self._wants_output:
            self._output.add(ids[max(known, self._prompt) :])
        if not self._wants_ids or not new:
            return
        self._ids.extend(new)
        if self._dry and len(new) > 16:  # a prompt
            self._runs = repeated_runs(ids, self._breakers)
        elif self._dry:
            whole = self._ids.values
            for size in range(known + 1, self._size + 1):
                self._runs = prolong_runs(self._runs, whole[:size], self._breakers)

    def seen(self, drafted: Sequence[int] = ()) -> Seen:
        """As if `drafted` stood behind the sequence."""
        ids, runs = self._ids.values, self._runs
        if drafted and self._wants_ids:
            ids = np.concatenate([ids, np.array(drafted, dtype=np.int64)])
            for size in range(self._size + 1, len(ids) + 1) if self._dry else ():
                runs = prolong_runs(runs, ids[:size], self._breakers)
        distinct, _ = self._all.tokens_and_times(drafted if self._wants_all else ())
        said, times = self._output.tokens_and_times(drafted if self._wants_output else ())
        return Seen(ids, distinct, said, times, runs)


@dataclass
class _Grown:
    """Numbers in one array with room behind them."""

    _room: Ints = field(default_factory=lambda: np.zeros(64, dtype=np.int64))
    _size: int = 0

    @property
    def values(self) -> Ints:
        return self._room[: self._size]

    def extend(self, numbers: Sequence[int]) -> None:
        size = self._size + len(numbers)
        if size > len(self._room):
            room = np.zeros(2 * size, dtype=np.int64)
            room[: self._size] = self.values
            self._room = room
        self._room[self._size : size] = numbers
        self._size = size


class _Tally:
    """How often each token occurred, in the order of the first time."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._tokens, self._times = _Grown(), _Grown()

    def add(self, tokens: Sequence[int]) -> None:
        slots, known = self._slots, len(self._slots)
        places = [slots.setdefault(token, len(slots)) for token in tokens]
        if len(slots) > known:
            self._tokens.extend(_last_keys(slots, len(slots) - known))
            self._times.extend([0] * (len(slots) - known))
        if len(places) == 1:
            self._times.values[places[0]] += 1
        elif places:
            self._times.values[:] += np.bincount(places, minlength=len(slots))

    def tokens_and_times(self, drafted: Sequence[int]) -> tuple[Ints, Ints]:
        """With the drafted tokens counted in."""
        tokens, times = self._tokens.values, self._times.values
        if not drafted:
            return tokens, times
        new = [token for token in dict.fromkeys(drafted) if token not in self._slots]
        tokens = np.concatenate([tokens, np.array(new, dtype=np.int64)])
        times = np.concatenate([times, np.zeros(len(new), dtype=np.int64)])
        slots = {token: len(self._slots) + i for i, token in enumerate(new)}
        for token in drafted:
            times[slots[token] if token in slots else self._slots[token]] += 1
        return tokens, times


def _last_keys(table: dict[int, int], count: int) -> list[int]:
    """The keys put in last, in their order."""
    keys = reversed(table)
    return [next(keys) for _ in range(count)][::-1]
