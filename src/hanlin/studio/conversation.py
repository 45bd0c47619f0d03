"""A conversation as the page holds it: turns, answers token by token, and what of it fits into the model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hanlin.engine import Event, TokenLogprob, Usage
from hanlin.engine.types import FinishReason
from hanlin.serve.spelling import Speller
from hanlin.tokens import Tokenizer

Messages = list[dict[str, str]]


@dataclass
class Piece:
    """A stretch of an answer: one token, or the tokens that spell one character together."""

    start: int
    tokens: list[TokenLogprob]

    @property
    def probability(self) -> float:
        return math.exp(sum(token.logprob for token in self.tokens))


@dataclass
class Answer:
    """The assistant's turn while it comes and when it is whole."""

    tokenizer: Tokenizer
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    usage: Usage | None = None
    ended: FinishReason | None = None
    notice: str = ""  # an error or a remark, shown below the text
    forgot: bool = False  # earlier turns did not fit into the context
    _speller: Speller | None = None

    def add(self, event: Event) -> None:
        """The next event of the engine."""
        if self._speller is None:
            self._speller = Speller(self.tokenizer)
        self.text += event.text
        for start, token in self._speller.push(event.text, event.logprobs or []):
            if self.pieces and self.pieces[-1].start == start:
                self.pieces[-1].tokens.append(token)
            else:
                self.pieces.append(Piece(start, [token]))
        if event.completion is not None:
            self.usage = event.completion.usage
            self.ended = event.completion.finish_reason

    @property
    def tokens_per_second(self) -> float | None:
        """Of the decoding, without the wait for the first token; None where there is nothing to measure."""
        if self.usage is None or self.usage.completion_tokens < 2:
            return None
        seconds = self.usage.total_s - self.usage.first_token_s
        return (self.usage.completion_tokens - 1) / seconds if seconds > 0 else None


@dataclass
class Exchange:
    """A question and its answer."""

    question: str
    answer: Answer


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
    exchanges: Sequence[Exchange],
    *,
    system: str,
    chat: Callable[[Messages], list[int]],
    context: int,
    max_tokens: int,
) -> Fitted:
    """The prompt for the last exchange's answer, with as many earlier turns as leave room for it.

    The room kept free is max_tokens, but at most half of the context. The earliest exchanges go first; the system
    prompt stays.
    """
    room = min(max_tokens, context // 2)
    ids: list[int] = []
    for first in range(len(exchanges)):
        messages: Messages = [{"role": "system", "content": system}] if system else []
        for exchange in exchanges[first:-1]:
            messages.append({"role": "user", "content": exchange.question})
            messages.append({"role": "assistant", "content": exchange.answer.text})
        messages.append({"role": "user", "content": exchanges[-1].question})
        ids = chat(messages)
        last = first == len(exchanges) - 1
        if len(ids) + (1 if last else room) <= context:
            return Fitted(ids, min(max_tokens, context - len(ids)), forgot=first > 0)
    raise TooLongError(len(ids) + 1)
