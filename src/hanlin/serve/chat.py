"""POST /v1/chat/completions: a conversation in, the assistant's next turn out, whole or streamed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hanlin.engine import Completion, Engine
from hanlin.serve.answers import Envelope, chat_logprobs, server_sent_event, usage_of
from hanlin.serve.generation import Generation
from hanlin.serve.models import make_params, models_of
from hanlin.serve.requests import ChatRequest, read_request
from hanlin.serve.spelling import Speller
from hanlin.serve.streaming import StreamedAnswer, describe_body

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=describe_body(ChatRequest))
async def complete_chat(request: Request) -> Response:
    body = await read_request(request, ChatRequest)
    name, engine = models_of(request).find(body.model)
    body.check_together(vocab_size=engine.tokenizer.size)
    messages = [message.as_dict() for message in body.messages]
    ids = await asyncio.to_thread(engine.tokenizer.chat, messages)
    limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    params = make_params(body, engine, [ids], max_tokens=limit, logprobs=top)
    watch = request.app.state.metrics[name].watch()
    generation = Generation(engine, [ids], params, watch=watch)
    envelope = Envelope("chat.completion", name, "chatcmpl")
    if body.stream:
        return StreamedAnswer(_chunks(body, engine, generation, envelope, len(ids)), generation)
    async with generation.watched(request):
        completions = await generation.completions()
    choices = [_choice(completion, engine) for completion in completions]
    return JSONResponse(envelope.wrap(choices, usage=usage_of(completions, prompt_tokens=len(ids))))


def _choice(completion: Completion, engine: Engine) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        tokens = Speller(engine.tokenizer).push(completion.text, completion.logprobs)
        logprobs = chat_logprobs(tokens, engine.tokenizer)
    message = {"role": "assistant", "content": completion.text, "refusal": None}
    return {
        "index": completion.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }


async def _chunks(
    body: ChatRequest, engine: Engine, generation: Generation, envelope: Envelope, prompt_tokens: int
) -> AsyncIterator[bytes]:
    """A chunk with the role, chunks with text, a chunk with the reason of the end; last, if asked for, the usage."""

    def chunk(part: int, delta: dict[str, Any], logprobs: Any = None, end: str | None = None) -> bytes:
        choice = {"index": part, "delta": delta, "logprobs": logprobs, "finish_reason": end}
        return server_sent_event(envelope.wrap([choice], chunk=True))

    spellers = [Speller(engine.tokenizer) for _ in range(generation.parts)]
    for part in range(generation.parts):
        yield chunk(part, {"role": "assistant", "content": "", "refusal": None})
    finished = []
    async for part, event in generation.events():
        due = spellers[part].push(event.text, event.logprobs or [])
        if event.text or due:
            yield chunk(part, {"content": event.text}, chat_logprobs(due, engine.tokenizer) if body.logprobs else None)
        if event.completion is not None:
            finished.append(event.completion)
            yield chunk(part, {}, end=event.completion.finish_reason)
    if body.include_usage:
        yield server_sent_event(envelope.wrap([], chunk=True, usage=usage_of(finished, prompt_tokens=prompt_tokens)))
