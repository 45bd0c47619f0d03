"""The items of an answer of /v1/responses: reasoning, a message, calls of functions; whole, or event by event."""

import uuid
from collections.abc import Iterator
from typing import Any

from hanlin.serve.answers import chat_logprobs
from hanlin.serve.turns import CallPiece, Delta, Turn
from hanlin.tokens import Tokenizer

Event = tuple[str, dict[str, Any]]  # type, fields


class Items:
    """Items grow with the deltas of a turn; each is closed before the next begins.

    tokenizer: given if the log-probabilities of the text are wanted.
    """

    def __init__(self, turn: Turn, tokenizer: Tokenizer | None = None) -> None:
        self._turn, self._tokenizer = turn, tokenizer
        self._output: list[dict[str, Any]] = []
        self._open = False

    def push(self, delta: Delta) -> Iterator[Event]:
        """The events of what came."""
        if delta.reasoning:
            yield from self._begin("reasoning")
            yield self._grow("reasoning_text", delta.reasoning)
        if delta.text:
            yield from self._begin("message")
            logprobs = self._logprobs(delta)
            part = self._output[-1]["content"][0]
            part["logprobs"] += logprobs
            kind, fields = self._grow("output_text", delta.text)
            yield kind, fields | {"logprobs": logprobs}
        for piece in delta.calls:
            if piece.id:
                yield from self._begin("function_call", piece)
            if piece.arguments:
                self._output[-1]["arguments"] += piece.arguments
                yield "response.function_call_arguments.delta", self._place() | {"delta": piece.arguments}

    def finish(self) -> Iterator[Event]:
        """Close what is open; an answer without anything is an empty message."""
        if not self._output:
            yield from self._begin("message")
        yield from self._end()

    def whole(self, status: str) -> list[dict[str, Any]]:
        """All items; status: of the response, which the last item shares if it was cut short."""
        if not self._output:  # nothing was streamed
            turn = self._turn
            pieces = tuple(CallPiece(n, call.id, call.name, call.arguments) for n, call in enumerate(turn.calls))
            for _ in self.push(Delta(turn.reasoning, turn.text, pieces, tuple(turn.tokens))):
                pass
            for _ in self.finish():
                pass
        if status != "completed":
            self._output[-1]["status"] = "incomplete"
        return self._output

    def _begin(self, kind: str, piece: CallPiece | None = None) -> Iterator[Event]:
        if self._open and self._output[-1]["type"] == kind and kind != "function_call":
            return
        yield from self._end()
        item: dict[str, Any]
        part: dict[str, Any] | None = None
        if kind == "reasoning":
            part = {"type": "reasoning_text", "text": ""}
            item = {"id": _new("rs"), "type": kind, "status": "in_progress", "summary": [], "content": []}
        elif kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": _new("msg"), "type": kind, "status": "in_progress", "role": "assistant", "content": []}
        else:
            assert piece is not None
            item = {"id": _new("fc"), "type": kind, "status": "in_progress"}
            item |= {"call_id": piece.id, "name": piece.name, "arguments": ""}
        self._output.append(item)
        self._open = True
        yield "response.output_item.added", {"output_index": len(self._output) - 1, "item": item | {}}
        if part is not None:
            yield "response.content_part.added", self._place(0) | {"part": dict(part)}
            item["content"] = [part]

    def _grow(self, kind: str, text: str) -> Event:
        self._output[-1]["content"][0]["text"] += text
        return f"response.{kind}.delta", self._place(0) | {"delta": text}

    def _end(self) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        item["status"] = "completed"
        if item["type"] == "function_call":
            done = self._place() | {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", done
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield f"response.{part['type']}.done", self._place(0) | {"text": part["text"]} | more
            yield "response.content_part.done", self._place(0) | {"part": part}
        yield "response.output_item.done", {"output_index": len(self._output) - 1, "item": item}

    def _place(self, content: int | None = None) -> dict[str, Any]:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return place | ({} if content is None else {"content_index": content})

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        if self._tokenizer is None:
            return []
        return chat_logprobs(delta.tokens, self._tokenizer)["content"]


def message_of(turn: Turn) -> dict[str, Any]:
    """The turn as a chat message, for what continues the conversation."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.text}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.calls
        ]
    return message


def _new(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
