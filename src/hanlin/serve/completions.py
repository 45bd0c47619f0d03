"""POST /v1/completions: prompts in (text or token ids, one or many), continuations out, whole or streamed.

With `echo` and `logprobs` the prompt's own log-probabilities come too, which is how evaluation tools score an answer.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hanlin.engine import Completion, Engine, SamplingParams, TokenLogprob
from hanlin.serve.answers import (
    Envelope,
    completion_logprobs,
    fresh_id,
    prompt_logprobs,
    server_sent_event,
    usage,
    usage_of,
)
from hanlin.serve.completion_request import CompletionRequest
from hanlin.serve.errors import ApiError
from hanlin.serve.generation import Generation, start
from hanlin.serve.models import Served, find_model, room_for
from hanlin.serve.requests import read_request
from hanlin.serve.spelling import Ruler, Transcript
from hanlin.serve.streaming import StreamedAnswer, describe_body

router = APIRouter()


@dataclass(frozen=True)
class Prompt:
    """ids; echo: its text if it is to be repeated; scored: its tokens but the first with their log-probabilities."""

    ids: list[int]
    echo: str = ""
    scored: Sequence[TokenLogprob] | None = None

    def echoed(self, *, wanted: bool) -> list[int | TokenLogprob]:
        return [self.ids[0], *(self.scored or ())] if wanted else []


@router.post("/v1/completions", openapi_extra=describe_body(CompletionRequest))
async def complete_text(request: Request) -> Response:
    body = await read_request(request, CompletionRequest)
    served = find_model(request, body.model)
    tokenizer = served.engine.tokenizer
    body.check_together(vocab_size=tokenizer.size)
    prompts = await asyncio.to_thread(_encode, body, served.engine)
    ids = [prompt.ids for prompt in prompts]
    params = body.sampling(
        tokenizer,
        max_tokens=room_for(served.engine, ids, max(body.max_tokens, 1), param="prompt"),
        logprobs=body.logprobs,
        prompt_logprobs=None if body.stream else _scores(body),
        constraint=body.constraint(),
    )
    envelope = Envelope("text_completion", served.name, "cmpl", id=body.request_id or fresh_id())
    if _scores(body) is not None and (body.stream or not body.max_tokens):
        prompts = await _scored(request, served, body, prompts, params)
    generation = await start(request, served, body, ids if body.max_tokens else [], params)
    if body.stream:
        return StreamedAnswer(_chunks(body, served.engine, params, generation, envelope, prompts), generation)
    async with generation.watched(request):
        completions = await generation.completions()
    whole = completions or [None] * (len(prompts) * body.n)
    choices = [
        _choice(body, served.engine, params, part, prompts[part // body.n], whole[part])
        for part in range(len(prompts) * body.n)
    ]
    return JSONResponse(envelope.wrap(choices, usage=usage_of(completions, prompt_tokens=sum(map(len, ids)))))


def _scores(body: CompletionRequest) -> int | None:
    """How many alternatives are wanted beside each token of the prompt; None: no log-probabilities of it."""
    echoed = body.logprobs if body.echo else None
    return max((k for k in (echoed, body.prompt_logprobs) if k is not None), default=None)


def _encode(body: CompletionRequest, engine: Engine) -> list[Prompt]:
    prompts = []
    for given in body.prompts:
        ids = engine.tokenizer.prompt(given) if isinstance(given, str) else given
        if not ids:
            raise ApiError(
                400, "'prompt' is empty: there is nothing to continue.", param="prompt", code="invalid_value"
            )
        text = given if isinstance(given, str) else engine.tokenizer.decode(ids)
        prompts.append(Prompt(ids, text if body.echo else ""))
    return prompts


async def _scored(
    request: Request, served: Served, body: CompletionRequest, prompts: Sequence[Prompt], params: SamplingParams
) -> list[Prompt]:
    """The prompts with their log-probabilities, from a run of their own: a stream shows them before its first token."""
    ids = [prompt.ids for prompt in prompts]
    only = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=_scores(body), ignore_eos=True)
    scoring = await start(request, served, body, ids, only)
    async with scoring.watched(request):
        completions = await scoring.completions()
    return [replace(p, scored=c.prompt_logprobs) for p, c in zip(prompts, completions, strict=True)]


def _choice(
    body: CompletionRequest,
    engine: Engine,
    params: SamplingParams,
    part: int,
    prompt: Prompt,
    completion: Completion | None,
) -> dict[str, Any]:
    """completion: None if only the prompt was to be scored."""
    tokenizer = engine.tokenizer
    scored = prompt.scored
    shown = () if body.skip_special_tokens else tokenizer.special.values()
    text = ""
    if completion is not None:
        scored = scored or completion.prompt_logprobs
        text = Transcript(tokenizer, params, shown=shown).whole(completion)
    prompt = replace(prompt, scored=scored)
    logprobs = None
    if body.logprobs is not None:
        tokens = [*prompt.echoed(wanted=body.echo), *((completion.logprobs or []) if completion else [])]
        logprobs = completion_logprobs(tokens, tokenizer, Ruler(tokenizer))
    choice: dict[str, Any] = {
        "index": part,
        "text": prompt.echo + text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason if completion else "length",
    }
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(scored or [], tokenizer)
    if body.return_token_ids:
        choice |= {"prompt_token_ids": prompt.ids, "token_ids": completion.token_ids if completion else []}
    return choice


async def _chunks(
    body: CompletionRequest,
    engine: Engine,
    params: SamplingParams,
    generation: Generation,
    envelope: Envelope,
    prompts: Sequence[Prompt],
) -> AsyncIterator[bytes]:
    """The echo, then the text, then a chunk with the reason of the end, for each completion; last the usage."""
    tokenizer = engine.tokenizer
    parts = len(prompts) * body.n
    shown = () if body.skip_special_tokens else tokenizer.special.values()
    rulers = [Ruler(tokenizer) for _ in range(parts)]
    transcripts = [Transcript(tokenizer, params, shown=shown) for _ in range(parts)]
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    written = 0

    def chunk(
        part: int, text: str, tokens: Sequence[int | TokenLogprob] = (), end: str | None = None, **more: Any
    ) -> bytes:
        logprobs = completion_logprobs(tokens, tokenizer, rulers[part]) if tokens else None
        choice = {"index": part, "text": text, "logprobs": logprobs, "finish_reason": end} | more
        counts = usage(prompt_tokens, written) if body.usage_in_chunks else None
        return server_sent_event(envelope.wrap([choice], usage=counts))

    for part in range(parts):
        prompt = prompts[part // body.n]
        more: dict[str, Any] = {"prompt_token_ids": prompt.ids, "token_ids": []} if body.return_token_ids else {}
        if body.prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(prompt.scored or [], tokenizer)
        if body.echo or more:
            echoed = prompt.echoed(wanted=body.echo and body.logprobs is not None)
            yield chunk(part, prompt.echo, echoed, None if body.max_tokens else "length", **more)
    finished = []
    async for part, event in generation.events():
        text = transcripts[part].push(event)
        written += len(event.token_ids)
        tokens = (event.logprobs or []) if body.logprobs is not None else []
        if text or tokens or (body.return_token_ids and event.token_ids):
            more = {"token_ids": event.token_ids} if body.return_token_ids else {}
            yield chunk(part, text, tokens, end=None, **more)
        if event.completion is not None:
            finished.append(event.completion)
            yield chunk(part, "", end=event.completion.finish_reason)
    if body.include_usage:
        yield server_sent_event(envelope.wrap([], usage=usage_of(finished, prompt_tokens=prompt_tokens)))
