"""`Turn`: the assistant's turn as it grows, told apart into reasoning, text and calls of tools.

    engine's events ──> Transcript ──> ReasoningParser ──> ToolParser ──> Delta(reasoning, text, calls)

All conversational interfaces are written from these deltas, streamed or joined, so both say the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hanlin.engine import Completion, Event, SamplingParams
from hanlin.engine.types import Constraint
from hanlin.serve.chat_request import ChatRequest
from hanlin.serve.reasoning import ReasoningFormat, ReasoningParser, reasoning_of
from hanlin.serve.spelling import Placed, Speller, Transcript
from hanlin.serve.tool_calls import Arguments, CallStart, Content, ToolParser
from hanlin.serve.tool_calls import Delta as ToolDelta
from hanlin.serve.tool_formats import ToolFormat, constraint_for, format_of
from hanlin.tokens import Tokenizer


@dataclass(frozen=True)
class CallPiece:
    """A piece of a call: its id and name when it begins, more of its arguments (JSON text) afterwards."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """What one event adds to a turn. tokens: those whose text has left, with their log-probabilities."""

    reasoning: str = ""
    text: str = ""
    calls: tuple[CallPiece, ...] = ()
    tokens: tuple[Placed, ...] = ()


@dataclass
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass(frozen=True)
class Reading:
    """How turns are read. tools: how calls are written, None if none are looked for; names: of the tools; parallel:
    whether more than one call counts. reasoning: how it is marked, None if it is not told apart. shown: special tokens
    that are seen in the text."""

    tools: ToolFormat | None = None
    names: frozenset[str] = frozenset()
    parallel: bool = True
    reasoning: ReasoningFormat | None = None
    shown: frozenset[int] = frozenset()


def reading_of(body: ChatRequest, tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[Reading, Constraint | None]:
    """How the answers of a request with this prompt are read, and what they must match."""
    constraint = body.constraint()
    form, names = None, frozenset[str]()
    if body.offered:
        form = format_of(tokenizer) or ToolFormat("hermes")  # which is also how `prompting` tells of tools in words
        names = frozenset(tool["function"]["name"] for tool in body.offered)
        if body.forced is not False:
            choice = body.tool_choice if isinstance(body.tool_choice, str) else {"function": {"name": body.forced}}
            constraint = constraint_for(body.offered, choice, form, parallel=body.parallel_tool_calls)
    thoughts = None if constraint is not None else reasoning_of(tokenizer, ids)  # a prescribed form leaves no room
    shown = set() if form is None else {token for _, token in form.special}
    if thoughts is not None:
        shown |= {tokenizer.special[m] for m in (thoughts.opening, thoughts.closing) if m in tokenizer.special}
    if not body.skip_special_tokens:
        shown |= set(tokenizer.special.values())
    reading = Reading(form, names, body.parallel_tool_calls, thoughts, frozenset(shown))
    return reading, constraint


class Turn:
    """One completion of a conversation. prefix: stands before the text: what was continued, if it is to be echoed."""

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, reading: Reading, index: int = 0, prefix: str = ""
    ) -> None:
        self.index, self.prefix = index, prefix
        self.text, self.reasoning = prefix, ""
        self.calls: list[Call] = []
        self.tokens: list[Placed] = []
        self.token_count = self.reasoning_tokens = 0
        self.completion: Completion | None = None
        self._parallel = reading.parallel
        self._transcript = Transcript(tokenizer, params, shown=reading.shown)
        self._speller = Speller(tokenizer, silent=self._transcript.silent)
        self._thoughts = None if reading.reasoning is None else ReasoningParser(reading.reasoning)
        self._tools = None if reading.tools is None else ToolParser(reading.tools, names=reading.names)

    @property
    def finish_reason(self) -> Literal["stop", "length", "tool_calls", "abort"]:
        """OpenAI's word for how the turn ended; an answer that was cut short may hold the beginning of a call."""
        assert self.completion is not None
        reason = self.completion.finish_reason
        return "tool_calls" if self.calls and reason == "stop" else reason

    def push(self, event: Event) -> Delta:
        """Take the next event; what it adds."""
        raw = self._transcript.push(event)
        tokens = tuple(self._speller.push(raw, event.logprobs or []))
        last = event.completion is not None
        if last:
            self.completion = event.completion
        self.token_count += len(event.token_ids)
        reasoning, text = self._tell_reasoning(raw, len(event.token_ids), last=last)
        pieces: list[CallPiece] = []
        if self._tools is not None:
            due = self._tools.push(text) + (self._tools.finish() if last else [])
            text = "".join(delta.text for delta in due if isinstance(delta, Content))
            pieces = self._tell_calls(due)
        self.reasoning += reasoning
        self.text += text
        self.tokens += tokens
        return Delta(reasoning, text, tuple(pieces), tokens)

    def _tell_reasoning(self, raw: str, tokens: int, *, last: bool) -> tuple[str, str]:
        if self._thoughts is None:
            return "", raw
        begun = self._thoughts.thinking
        splits = [self._thoughts.push(raw), *([self._thoughts.finish()] if last else [])]
        if begun or self._thoughts.thinking:
            self.reasoning_tokens += tokens
        return "".join(split.reasoning for split in splits), "".join(split.content for split in splits)

    def _tell_calls(self, due: Sequence[ToolDelta]) -> list[CallPiece]:
        pieces: list[CallPiece] = []
        for delta in due:
            if isinstance(delta, Content) or (delta.index and not self._parallel):
                continue
            if isinstance(delta, CallStart):
                self.calls.append(Call(delta.id, delta.name))
                pieces.append(CallPiece(delta.index, delta.id, delta.name))
            elif isinstance(delta, Arguments):
                self.calls[delta.index].arguments += delta.text
                pieces.append(CallPiece(delta.index, arguments=delta.text))
        return pieces
