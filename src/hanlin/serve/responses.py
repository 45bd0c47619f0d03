"""POST /v1/responses: OpenAI's newer interface. Answers are items and are kept (`store.py`), streams are typed events.

created → in_progress → (output_item.added → content_part.added → output_text.delta … → output_text.done →
content_part.done → output_item.done)* → completed | incomplete | failed
"""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hanlin.serve.access import account_of
from hanlin.serve.answers import server_sent_event
from hanlin.serve.conversation import Conversation, begin
from hanlin.serve.errors import ApiError, describe_error
from hanlin.serve.requests import read_request
from hanlin.serve.response_items import Items, message_of
from hanlin.serve.responses_request import REFUSED, ResponsesRequest
from hanlin.serve.store import Kept, ResponseStore
from hanlin.serve.streaming import StreamedAnswer, describe_body
from hanlin.serve.turns import Turn

router = APIRouter()
kept = APIRouter()


@router.post("/v1/responses", openapi_extra=describe_body(ResponsesRequest))
async def respond(request: Request) -> Response:
    body = await read_request(request, ResponsesRequest, refusals=REFUSED)
    store, owner = _store(request), account_of(request).key.key
    before = []
    if body.previous_response_id is not None:
        before = store.get(body.previous_response_id, owner, param="previous_response_id").messages
    talk = await begin(request, body.as_chat(before))
    response = _opened(body, talk)
    entry = Kept(owner, response, [*before, *body.messages()], list(body.input), talk.generation)
    if body.store:
        store.put(entry)
    if body.stream:
        return StreamedAnswer(_events(body, talk, entry, store), talk.generation, end=b"", failed=_streamed_error)
    try:
        turn = (await talk.finish(request))[0]
        _close(entry, turn, talk)
    except BaseException as error:
        _fail(entry, error)
        raise
    finally:
        entry.generation = None
        if body.store:
            store.put(entry)
    return JSONResponse(entry.response)


@kept.get("/v1/responses/{response_id}")
async def show_response(request: Request, response_id: str) -> dict[str, Any]:
    return _store(request).get(response_id, account_of(request).key.key).response


@kept.delete("/v1/responses/{response_id}")
async def forget_response(request: Request, response_id: str) -> dict[str, Any]:
    _store(request).drop(response_id, account_of(request).key.key)
    return {"id": response_id, "object": "response", "deleted": True}


@kept.get("/v1/responses/{response_id}/input_items")
async def show_input(request: Request, response_id: str) -> dict[str, Any]:
    items = _store(request).get(response_id, account_of(request).key.key).items
    data = [{"id": f"item_{number}", "type": "message"} | item for number, item in enumerate(items)]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": False, **ends}


@kept.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> dict[str, Any]:
    """End an answer that is being streamed elsewhere; one that has ended stays as it is."""
    entry = _store(request).get(response_id, account_of(request).key.key)
    if entry.generation is not None:
        entry.generation.abort()
        entry.response |= {"status": "cancelled"}
    return entry.response


def _store(request: Request) -> ResponseStore:
    return request.app.state.responses


def _opened(body: ResponsesRequest, talk: Conversation) -> dict[str, Any]:
    """The response object before there is an answer: it repeats what was asked for."""
    chat = talk.body
    choice = body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump()
    reasoning = body.reasoning.model_dump(include={"effort", "summary"}) if body.reasoning else None
    form = body.text.format.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "model": talk.served.name,
        "previous_response_id": body.previous_response_id,
        "instructions": body.instructions,
        "output": [],
        "error": None,
        "tools": [tool.model_dump() for tool in body.tools],
        "tool_choice": choice,
        "truncation": "disabled",
        "parallel_tool_calls": chat.parallel_tool_calls,
        "text": {"format": form},
        "top_p": chat.top_p,
        "presence_penalty": chat.presence_penalty,
        "frequency_penalty": chat.frequency_penalty,
        "top_logprobs": body.top_logprobs or 0,
        "temperature": chat.temperature,
        "reasoning": reasoning or {"effort": None, "summary": None},
        "usage": None,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "store": body.store,
        "background": False,
        "service_tier": "default",
        "metadata": body.metadata,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }


def _close(entry: Kept, turn: Turn, talk: Conversation, items: Items | None = None) -> None:
    """The answer has ended: write it into the response and the conversation."""
    reason = turn.finish_reason
    items = items or Items(turn, talk.served.engine.tokenizer if talk.body.logprobs else None)
    status = {"length": "incomplete", "abort": "cancelled"}.get(reason, "completed")
    counts = talk.usage()
    entry.response |= {
        "status": status,
        "completed_at": int(time.time()) if status == "completed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
        "output": items.whole(status),
        "usage": {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": counts["completion_tokens_details"],
            "total_tokens": counts["total_tokens"],
        },
    }
    entry.messages.append(message_of(turn))


def _fail(entry: Kept, error: BaseException) -> None:
    _, body = describe_error(error) if isinstance(error, Exception) else (499, {"error": {"message": "cancelled"}})
    code = body["error"].get("code") or "server_error"
    entry.response |= {"status": "failed", "error": {"code": code, "message": body["error"]["message"]}}


async def _events(
    body: ResponsesRequest, talk: Conversation, entry: Kept, store: ResponseStore
) -> AsyncIterator[bytes]:
    number = -1

    def event(kind: str, **more: Any) -> bytes:
        nonlocal number
        number += 1
        return server_sent_event({"type": kind, "sequence_number": number, **more}, name=kind)

    turn = talk.turns[0]
    items = Items(turn, talk.served.engine.tokenizer if talk.body.logprobs else None)
    try:
        yield event("response.created", response=entry.response)
        yield event("response.in_progress", response=entry.response)
        async for _, delta, _ in talk.deltas():
            for kind, more in items.push(delta):
                yield event(kind, **more)
        for kind, more in items.finish():
            yield event(kind, **more)
        _close(entry, turn, talk, items)
        last = "completed" if entry.response["status"] == "completed" else "incomplete"
        yield event(f"response.{last}", response=entry.response)
    except ApiError as error:  # the engine's own errors are told by the stream's guard
        _fail(entry, error)
        yield event("response.failed", response=entry.response)
    except BaseException as error:
        _fail(entry, error)
        raise
    finally:
        entry.generation = None
        if body.store:
            store.put(entry)


def _streamed_error(body: dict[str, Any]) -> bytes:
    return server_sent_event({**body["error"], "type": "error"}, name="error")
