"""POST /v1/completions: prompts in (text or token ids, one or many), continuations out, whole or streamed.

With `echo` and `logprobs` the prompt's own log-probabilities come too, which is how evaluation tools score an answer.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hanlin.engine import Completion, Engine, TokenLogprob
from hanlin.serve.answers import Envelope, completion_logprobs, server_sent_event, usage_of
from hanlin.serve.errors import ApiError
from hanlin.serve.generation import Generation
from hanlin.serve.models import make_params, models_of
from hanlin.serve.requests import CompletionRequest, read_request
from hanlin.serve.scoring import score_prompt
from hanlin.serve.spelling import Ruler
from hanlin.serve.streaming import StreamedAnswer, describe_body

router = APIRouter()


@dataclass(frozen=True)
class Echo:
    """What precedes each completion: nothing, or its prompt with the prompt's log-probabilities."""

    text: str = ""
    tokens: Sequence[int | TokenLogprob] = ()


@router.post("/v1/completions", openapi_extra=describe_body(CompletionRequest))
async def complete_text(request: Request) -> Response:
    body = await read_request(request, CompletionRequest)
    name, engine = models_of(request).find(body.model)
    body.check_together(vocab_size=engine.tokenizer.size)
    prompts = await asyncio.to_thread(_encode, body, engine)
    params = make_params(body, engine, prompts, max_tokens=max(body.max_tokens, 1), logprobs=body.logprobs)
    envelope = Envelope("text_completion", name, "cmpl")
    watch = request.app.state.metrics[name].watch()
    generation = Generation(engine, prompts if body.max_tokens else [], params, watch=watch)
    try:
        echoes = await asyncio.to_thread(_echo, body, engine, prompts)
    except BaseException:
        generation.abort()
        raise
    if body.stream:
        return StreamedAnswer(_chunks(body, engine, generation, envelope, echoes, prompts), generation)
    async with generation.watched(request):
        completions = await generation.completions()
    choices = [
        _choice(body, engine, part, echoes[part // body.n], completions[part] if completions else None)
        for part in range(len(prompts) * body.n)
    ]
    usage = usage_of(completions, prompt_tokens=sum(map(len, prompts)))
    return JSONResponse(envelope.wrap(choices, usage=usage))


def _encode(body: CompletionRequest, engine: Engine) -> list[list[int]]:
    prompts = [engine.tokenizer.prompt(p) if isinstance(p, str) else p for p in body.prompts]
    if not all(prompts):
        raise ApiError(400, "'prompt' is empty: there is nothing to continue.", param="prompt", code="invalid_value")
    return prompts


def _echo(body: CompletionRequest, engine: Engine, prompts: Sequence[list[int]]) -> list[Echo]:
    if not body.echo:
        return [Echo()] * len(prompts)
    echoes = []
    for given, ids in zip(body.prompts, prompts, strict=True):
        text = given if isinstance(given, str) else engine.tokenizer.decode(ids)
        scored = [] if body.logprobs is None else [ids[0], *score_prompt(engine.model, ids, top=body.logprobs)]
        echoes.append(Echo(text, scored))
    return echoes


def _choice(
    body: CompletionRequest, engine: Engine, part: int, echo: Echo, completion: Completion | None
) -> dict[str, Any]:
    """completion: None if only the prompt was to be scored."""
    tokens = [*echo.tokens, *((completion.logprobs or []) if completion else [])]
    scored = body.logprobs is not None
    return {
        "index": part,
        "text": echo.text + (completion.text if completion else ""),
        "logprobs": completion_logprobs(tokens, engine.tokenizer, Ruler(engine.tokenizer)) if scored else None,
        "finish_reason": completion.finish_reason if completion else "length",
    }


async def _chunks(
    body: CompletionRequest,
    engine: Engine,
    generation: Generation,
    envelope: Envelope,
    echoes: Sequence[Echo],
    prompts: Sequence[list[int]],
) -> AsyncIterator[bytes]:
    """The echo, then the text, then a chunk with the reason of the end, for each completion; last the usage."""
    parts = len(prompts) * body.n
    rulers = [Ruler(engine.tokenizer) for _ in range(parts)]

    def chunk(part: int, text: str, tokens: Sequence[int | TokenLogprob] = (), end: str | None = None) -> bytes:
        scored = body.logprobs is not None and tokens
        logprobs = completion_logprobs(tokens, engine.tokenizer, rulers[part]) if scored else None
        choice = {"index": part, "text": text, "logprobs": logprobs, "finish_reason": end}
        return server_sent_event(envelope.wrap([choice]))

    for part in range(parts):
        echo = echoes[part // body.n]
        if body.echo or not body.max_tokens:
            yield chunk(part, echo.text, echo.tokens, None if body.max_tokens else "length")
    finished = []
    async for part, event in generation.events():
        if event.text or (event.logprobs and body.logprobs is not None):
            yield chunk(part, event.text, event.logprobs or [])
        if event.completion is not None:
            finished.append(event.completion)
            yield chunk(part, "", end=event.completion.finish_reason)
    if body.include_usage:
        usage = usage_of(finished, prompt_tokens=sum(map(len, prompts)))
        yield server_sent_event(envelope.wrap([], usage=usage))
