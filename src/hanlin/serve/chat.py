"""POST /v1/chat/completions: a conversation in, the assistant's next turn out, whole or streamed."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hanlin.serve.answers import Envelope, chat_logprobs, fresh_id, prompt_logprobs, server_sent_event
from hanlin.serve.chat_request import ChatRequest
from hanlin.serve.conversation import Conversation, begin
from hanlin.serve.requests import read_request
from hanlin.serve.streaming import StreamedAnswer, describe_body
from hanlin.serve.turns import Delta, Turn

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=describe_body(ChatRequest))
async def complete_chat(request: Request) -> Response:
    body = await read_request(request, ChatRequest)
    talk = await begin(request, body)
    envelope = Envelope("chat.completion", talk.served.name, "chatcmpl", id=body.request_id or fresh_id())
    if body.stream:
        return StreamedAnswer(_chunks(talk, envelope), talk.generation)
    turns = await talk.finish(request)
    more: dict[str, Any] = {}
    if body.prompt_logprobs is not None:
        scored = turns[0].completion.prompt_logprobs if turns[0].completion else None
        more["prompt_logprobs"] = prompt_logprobs(scored or [], talk.served.engine.tokenizer)
    if body.return_token_ids:
        more["prompt_token_ids"] = talk.ids
    choices = [_choice(turn, body, talk) for turn in turns]
    return JSONResponse(envelope.wrap(choices, usage=talk.usage(), **more))


def _choice(turn: Turn, body: ChatRequest, talk: Conversation) -> dict[str, Any]:
    assert turn.completion is not None
    message: dict[str, Any] = {"role": "assistant", "content": turn.text, "refusal": None, "annotations": []}
    if turn.calls:
        message["content"] = turn.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.calls
        ]
    if turn.reasoning and body.include_reasoning:
        message["reasoning_content"] = turn.reasoning
    choice = {
        "index": turn.index,
        "message": message,
        "logprobs": chat_logprobs(turn.tokens, talk.served.engine.tokenizer) if body.logprobs else None,
        "finish_reason": turn.finish_reason,
    }
    return choice | ({"token_ids": turn.completion.token_ids} if body.return_token_ids else {})


async def _chunks(talk: Conversation, envelope: Envelope) -> AsyncIterator[bytes]:
    """A chunk with the role, chunks with what is said, one with why it ended; last, if asked for, the usage."""
    body, tokenizer = talk.body, talk.served.engine.tokenizer

    def chunk(
        turn: Turn, delta: dict[str, Any], logprobs: Any = None, end: str | None = None, ids: list[int] | None = None
    ) -> bytes:
        choice = {"index": turn.index, "delta": delta, "logprobs": logprobs, "finish_reason": end}
        if body.return_token_ids and ids is not None:
            choice["token_ids"] = ids
        counts = talk.usage(running=True) if body.usage_in_chunks else None
        return server_sent_event(envelope.wrap([choice], chunk=True, usage=counts))

    for turn in talk.turns:
        role = {"role": "assistant", "content": turn.prefix, "refusal": None}
        if body.return_token_ids:
            choice = {"index": turn.index, "delta": role, "logprobs": None, "finish_reason": None}
            yield server_sent_event(envelope.wrap([choice], chunk=True, prompt_token_ids=talk.ids))
        else:
            yield chunk(turn, role)
    async for turn, delta, event in talk.deltas():
        said = _spoken(delta, body)
        logprobs = chat_logprobs(delta.tokens, tokenizer) if body.logprobs and delta.tokens else None
        if said or logprobs or (body.return_token_ids and event.token_ids):
            if logprobs and not said:
                said = {"content": ""}
            yield chunk(turn, said, logprobs, ids=event.token_ids)
        if turn.completion is not None:
            yield chunk(turn, {}, end=turn.finish_reason)
    more: dict[str, Any] = {}
    if body.prompt_logprobs is not None and talk.turns[0].completion is not None:
        more["prompt_logprobs"] = prompt_logprobs(talk.turns[0].completion.prompt_logprobs or [], tokenizer)
    if body.include_usage or more:
        counts = talk.usage() if body.include_usage else None
        yield server_sent_event(envelope.wrap([], chunk=True, usage=counts, **more))


def _spoken(delta: Delta, body: ChatRequest) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if delta.text:
        said["content"] = delta.text
    if delta.reasoning and body.include_reasoning:
        said["reasoning_content"] = delta.reasoning
    if delta.calls:
        said["tool_calls"] = [
            {"index": piece.index, "id": piece.id, "type": "function"}
            | {"function": {"name": piece.name, "arguments": piece.arguments}}
            if piece.id
            else {"index": piece.index, "function": {"arguments": piece.arguments}}
            for piece in delta.calls
        ]
    return said
