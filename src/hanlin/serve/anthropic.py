"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's interface to the same conversations.

message_start → (content_block_start → content_block_delta … → content_block_stop)* → message_delta → message_stop
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hanlin.serve.answers import server_sent_event
from hanlin.serve.anthropic_request import REFUSED, CountRequest, MessagesRequest
from hanlin.serve.conversation import Conversation, begin
from hanlin.serve.errors import anthropic_body
from hanlin.serve.models import find_model
from hanlin.serve.prompting import prompt_ids
from hanlin.serve.requests import read_request
from hanlin.serve.streaming import StreamedAnswer, describe_body
from hanlin.serve.turns import Delta, Turn

router = APIRouter()
counting = APIRouter()


@router.post("/v1/messages", openapi_extra=describe_body(MessagesRequest))
async def create_message(request: Request) -> Response:
    body = await read_request(request, MessagesRequest, refusals=REFUSED)
    talk = await begin(request, body.as_chat())
    if body.stream:
        return StreamedAnswer(_events(talk), talk.generation, end=b"", failed=_streamed_error)
    turn = (await talk.finish(request))[0]
    return JSONResponse(_message(talk, _blocks(turn)) | _ending(turn) | {"usage": _usage(talk)})


@counting.post("/v1/messages/count_tokens", openapi_extra=describe_body(CountRequest))
async def count_tokens(request: Request) -> dict[str, int]:
    body = await read_request(request, CountRequest, refusals=REFUSED)
    tokenizer = find_model(request, body.model).engine.tokenizer
    chat = body.as_chat()
    chat.check_together(vocab_size=tokenizer.size)
    return {"input_tokens": len(await asyncio.to_thread(prompt_ids, chat, tokenizer))}


def _message(talk: Conversation, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": talk.served.name,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
    }


def _ending(turn: Turn) -> dict[str, Any]:
    reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(turn.finish_reason, "end_turn")
    found = turn.completion.stop if turn.completion is not None else None
    if reason == "end_turn" and isinstance(found, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": found}
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(talk: Conversation, *, begun: bool = False) -> dict[str, Any]:
    """Anthropic counts cached tokens beside the others, not among them. begun: before there is an answer."""
    counts = talk.usage(running=begun)
    cached = counts.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    reasoned = counts.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": counts["prompt_tokens"] - cached,
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": reasoned},
        "cache_creation": None,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "inference_geo": None,
        "server_tool_use": None,
        "service_tier": "standard",
    }


def _blocks(turn: Turn) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if turn.reasoning:
        blocks.append({"type": "thinking", "thinking": turn.reasoning, "signature": ""})
    if turn.text or not turn.calls:
        blocks.append({"type": "text", "text": turn.text, "citations": None})
    for call in turn.calls:
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)}
        blocks.append(block | {"caller": {"type": "direct"}})
    return blocks


def _input(arguments: str) -> Any:
    """Arguments that were cut short are no JSON; what there is stays readable."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return {"incomplete": arguments}


async def _events(talk: Conversation) -> AsyncIterator[bytes]:
    def event(kind: str, **more: Any) -> bytes:
        return server_sent_event({"type": kind, **more}, name=kind)

    turn, blocks = talk.turns[0], _Blocks()
    yield event("message_start", message=_message(talk, []) | {"usage": _usage(talk, begun=True)})
    async for _, delta, _ in talk.deltas():
        for kind, more in blocks.push(delta):
            yield event(kind, **more)
    for kind, more in blocks.finish():
        yield event(kind, **more)
    yield event("message_delta", delta=_ending(turn) | {"stop_details": None, "container": None}, usage=_usage(talk))
    yield event("message_stop")


class _Blocks:
    """Content blocks as they grow: one is closed before the next begins."""

    def __init__(self) -> None:
        self._kind: str | None = None
        self._index = -1

    def push(self, delta: Delta) -> Iterator[tuple[str, dict[str, Any]]]:
        if delta.reasoning:
            yield from self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.text:
            yield from self._begin("text", {"type": "text", "text": "", "citations": None})
            yield self._delta({"type": "text_delta", "text": delta.text})
        for piece in delta.calls:
            if piece.id:
                block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
                yield from self._begin("tool_use", block | {"caller": {"type": "direct"}})
            if piece.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})

    def finish(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._index < 0:
            yield from self._begin("text", {"type": "text", "text": "", "citations": None})
        yield from self._end()

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        if kind == self._kind and kind != "tool_use":
            return
        yield from self._end()
        self._kind, self._index = kind, self._index + 1
        yield "content_block_start", {"index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "content_block_delta", {"index": self._index, "delta": delta}

    def _end(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._kind is not None:
            self._kind = None
            yield "content_block_stop", {"index": self._index}


def _streamed_error(body: dict[str, Any]) -> bytes:
    return server_sent_event(anthropic_body(500, body), name="error")
