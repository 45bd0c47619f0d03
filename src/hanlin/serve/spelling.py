"""Which token spells which part of the text.

Tokens and text come apart on the way out of the engine: a character may need several tokens, text that could be the
beginning of a stop string is held back, and end tokens have no text at all.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from hanlin.engine import TokenLogprob
from hanlin.tokens import Tokenizer


class Placed(NamedTuple):
    """A token and the index of the first character of the text that it helps to spell."""

    start: int
    token: TokenLogprob


class Ruler:
    """Measures, token after token, where in the text each begins."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._silent = frozenset(tokenizer.special.values())  # special tokens have no text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.position = start  # characters spelt completely so far

    def place(self, token: int) -> int:
        """Where this token, the next one, begins."""
        start = self.position
        if token not in self._silent:
            self.position += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return start


class Speller:
    """Keeps a stream's tokens and its text together.

    A token is released when the first character that it helps to spell has left, so that at any time the released
    tokens' bytes spell the text that was sent; special tokens and what lies behind a stop string never leave.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._silent = frozenset(tokenizer.special.values())
        self._ruler = Ruler(tokenizer)
        self._sent = 0
        self._waiting: deque[Placed] = deque()

    def push(self, text: str, tokens: Sequence[TokenLogprob]) -> list[Placed]:
        """Take the next piece of text and the next tokens, which need not belong together; give the tokens now due."""
        self._waiting += [Placed(self._ruler.place(t.token_id), t) for t in tokens if t.token_id not in self._silent]
        self._sent += len(text)
        due = []
        while self._waiting and self._waiting[0].start < self._sent:
            due.append(self._waiting.popleft())
        return due


def spell(token: bytes) -> str:
    """A token as a JSON string. A token that ends within a character is spelt `bytes:\\xe4\\xbd`, as OpenAI does."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
