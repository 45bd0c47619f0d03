"""Which token spells which part of the text.

Tokens and text come apart on the way out of the engine: a character may need several tokens, text that could be the
beginning of a stop string is held back, and end tokens have no text at all.
"""

import codecs
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from hanlin.engine import Completion, Event, SamplingParams, TokenLogprob
from hanlin.engine.text import TextStream
from hanlin.tokens import Tokenizer


class Placed(NamedTuple):
    """A token and the index of the first character of the text that it helps to spell."""

    start: int
    token: TokenLogprob


class Ruler:
    """Measures, token after token, where in the text each begins. silent: tokens without text; the special ones."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0, *, silent: Collection[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self.silent = frozenset(tokenizer.special.values() if silent is None else silent)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.position = start  # characters spelt completely so far

    def place(self, token: int) -> int:
        """Where this token, the next one, begins."""
        start = self.position
        if token not in self.silent:
            self.position += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return start


class Speller:
    """Keeps a stream's tokens and its text together.

    A token is released when the first character that it helps to spell has left, so that at any time the released
    tokens' bytes spell the text that was sent; special tokens and what lies behind a stop string never leave.
    """

    def __init__(self, tokenizer: Tokenizer, *, silent: Collection[int] | None = None) -> None:
        self._ruler = Ruler(tokenizer, silent=silent)
        self._silent = self._ruler.silent
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


class Transcript:
    """The text of one completion, event after event: the engine's own, or the one with special tokens spelt out.

    The engine's text has no special tokens. Where some are to be seen (skip_special_tokens false; formats of calls that
    are made of them), the text is spelt anew from the ids with the same stop strings; an end token is no part of it.

    shown: special tokens to be spelt out. silent: those that are not.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, shown: Collection[int] = ()) -> None:
        self._tokenizer, self._params = tokenizer, params
        self._anew = bool(shown)
        self.silent = frozenset(tokenizer.special.values()) - frozenset(shown)
        self._stream = TextStream(params.stop, include=params.include_stop)
        self._count = 0

    def push(self, event: Event) -> str:
        """The text that this event adds."""
        if not self._anew:
            return event.text
        tokens = event.token_ids
        if event.completion is not None:
            tokens = event.completion.token_ids[self._count :]
            if event.completion.finish_reason == "stop" and isinstance(event.completion.stop, int):
                tokens = tokens[:-1]
        text = ""
        for token in tokens:
            self._count += 1
            piece = b"" if token in self.silent else self._tokenizer.token_bytes(token)
            text += self._stream.push(piece, watch=self._count >= self._params.min_tokens)
        return text + (self._stream.finish() if event.completion is not None else "")

    def whole(self, completion: Completion) -> str:
        """The text of a completion in one go."""
        return self.push(Event(completion.text, completion.token_ids, None, completion.index, completion))


def spell(token: bytes) -> str:
    """A token as a JSON string. A token that ends within a character is spelt `bytes:\\xe4\\xbd`, as OpenAI does."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
