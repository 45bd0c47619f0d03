"""An answer as the page holds it, token by token, and the prompt that asks for one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hanlin.engine import Event, TokenLogprob, Usage
from hanlin.engine.types import FinishReason
from hanlin.serve.spelling import Speller
from hanlin.studio.conversation import Messages
from hanlin.tokens import Tokenizer


@dataclass
class Piece:
    """A stretch of an answer: one token, or the tokens that spell one character together."""

    start: int
    tokens: list[TokenLogprob]

    @property
    def probability(self) -> float:
        return math.exp(sum(token.logprob for token in self.tokens))


@dataclass(eq=False)
class Answer:
    """The assistant's turn while it comes and when it is whole. tokenizer: None for one that was read from a file,
    which has no tokens either."""

    model: str
    tokenizer: Tokenizer | None = None
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    usage: Usage | None = None
    ended: FinishReason | None = None
    notice: str = ""  # an error or a remark, shown below the text
    forgot: bool = False  # earlier turns did not fit into the context
    _speller: Speller | None = None

    def add(self, event: Event) -> None:
        """The next event of the engine."""
        self.text += event.text
        if self.tokenizer is not None:
            self._speller = self._speller or Speller(self.tokenizer)
            for start, token in self._speller.push(event.text, event.logprobs or []):
                if self.pieces and self.pieces[-1].start == start:
                    self.pieces[-1].tokens.append(token)
                else:
                    self.pieces.append(Piece(start, [token]))
        if event.completion is not None:
            self.usage = event.completion.usage
            self.ended = event.completion.finish_reason

    @property
    def running(self) -> bool:
        return self.ended is None and not self.notice

    @property
    def tokens_per_second(self) -> float | None:
        """Of the decoding, without the wait for the first token; None where there is nothing to measure."""
        if self.usage is None or self.usage.completion_tokens < 2:
            return None
        seconds = self.usage.total_s - self.usage.first_token_s
        return (self.usage.completion_tokens - 1) / seconds if seconds > 0 else None


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits: its ids, how many tokens the answer may have, and whether earlier turns were left out."""

    ids: list[int]
    max_tokens: int
    forgot: bool


class TooLongError(Exception):
    """The last question alone does not fit; `needed` tokens."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


def fit(
    messages: Messages, *, chat: Callable[[Sequence[dict[str, str]]], list[int]], context: int, max_tokens: int
) -> Fitted:
    """The prompt for the answer to the last message, with as many earlier turns as leave room for it.

    The room kept free is max_tokens, but at most half of the context. The earliest turns go first; the system prompt
    stays.
    """
    room = min(max_tokens, context // 2)
    system = [message for message in messages[:1] if message["role"] == "system"]
    begins = [number for number, message in enumerate(messages) if message["role"] == "user"]
    ids: list[int] = []
    for begin in begins:
        ids = chat([*system, *messages[begin:]])
        last = begin == begins[-1]
        if len(ids) + (1 if last else room) <= context:
            return Fitted(ids, min(max_tokens, context - len(ids)), forgot=begin > begins[0])
    raise TooLongError(len(ids) + 1)
