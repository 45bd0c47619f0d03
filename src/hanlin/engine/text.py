"""Tokens to text while they come: never half a character, never a piece of a stop string.

Bytes wait until they make whole characters (a Chinese character is three bytes and often two tokens); text that may be
the beginning of a stop string waits until it is decided. The pieces joined are the text, however the tokens were cut.

A text ends at the stop string that is complete first; of two that end at the same character the longer one counts.
"""

import codecs
from collections.abc import Sequence

from hanlin.tokens import Tokenizer


class Spelling:
    """The bytes that each token puts into a text: none for special tokens and for ids the tokenizer does not know."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = dict.fromkeys(tokenizer.special.values(), b"")

    def __call__(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._tokenizer.token_bytes(token)
        return self._known[token]


class TextStream:
    """The text of one completion. `stopped` once a stop string has ended it, `found` which. include: it stays."""

    def __init__(self, stop: Sequence[str] = (), *, include: bool = False) -> None:
        self._stop, self._include = tuple(stop), include
        self.found: str | None = None
        self._longest = max(map(len, stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes, *, watch: bool = True) -> str:
        """Take a token's bytes, give the text that is now certain. watch False: it cannot be part of a stop string."""
        return self._release(self._decoder.decode(piece), watch=watch)

    def finish(self) -> str:
        """No more tokens: the rest, in which an unfinished character is U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True)) + self._empty()

    def _release(self, text: str, *, watch: bool = True) -> str:
        if self.stopped:
            return ""
        if not self._stop or not watch:
            return self._empty() + text
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            end, begin, self.found = min(found)
            self.stopped = True
            return self._empty()[: end if self._include else begin]
        keep = self._undecided()
        due, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return due

    def _undecided(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0

    def _empty(self) -> str:
        text, self._held = self._held, ""
        return text
