"""The small routes: models, tokens, whether the server is well."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field

from hanlin import __version__
from hanlin.serve.access import account_of
from hanlin.serve.errors import ApiError
from hanlin.serve.limits import Gate
from hanlin.serve.messages import MAX_TOOLS, Message, Tool
from hanlin.serve.metrics import render_metrics
from hanlin.serve.models import find_model, models_of
from hanlin.serve.prompting import template_ids
from hanlin.serve.requests import Strict, read_request
from hanlin.serve.sampled import check_ids
from hanlin.serve.spelling import spell
from hanlin.serve.streaming import describe_body

guarded = APIRouter()
public = APIRouter()


class TokenizeRequest(Strict):
    """POST /tokenize: text, or a conversation through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    add_generation_prompt: bool = True
    add_special_tokens: bool = Field(True, description="of a prompt: the beginning token, if the model has one")
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]


@guarded.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    models = models_of(request)
    served = models.served(account_of(request).key.adapters)
    return {"object": "list", "data": [models.describe(one) for one in served.values()]}


@guarded.get("/v1/models/{model:path}")
async def show_model(request: Request, model: str) -> dict[str, Any]:
    return models_of(request).describe(find_model(request, model))


@guarded.post("/tokenize", openapi_extra=describe_body(TokenizeRequest))
async def tokenize(request: Request) -> dict[str, Any]:
    body = await read_request(request, TokenizeRequest)
    engine = find_model(request, body.model).engine
    tokenizer = engine.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Send either 'prompt' or 'messages'.", param="prompt", code="invalid_value")
    if body.prompt is not None:
        if body.tools or "add_generation_prompt" in body.model_fields_set:
            name = "tools" if body.tools else "add_generation_prompt"
            raise ApiError(400, f"'{name}' belongs to 'messages'.", param=name, code="invalid_value")
        ids = await asyncio.to_thread(tokenizer.prompt if body.add_special_tokens else tokenizer.encode, body.prompt)
    else:
        if "add_special_tokens" in body.model_fields_set and body.add_special_tokens:
            message = "'add_special_tokens' belongs to 'prompt': a conversation has the template's own."
            raise ApiError(400, message, param="add_special_tokens", code="invalid_value")
        tools = [tool.function.as_dict() for tool in body.tools]
        turns = [message.as_dict() for message in body.messages or []]
        ids = await asyncio.to_thread(template_ids, tokenizer, turns, tools, generate=body.add_generation_prompt)
    answer = {"count": len(ids), "max_model_len": engine.max_context, "tokens": ids}
    return answer | ({"token_strs": [spell(tokenizer.token_bytes(t)) for t in ids]} if body.return_token_strs else {})


@guarded.post("/detokenize", openapi_extra=describe_body(DetokenizeRequest))
async def detokenize(request: Request) -> dict[str, Any]:
    body = await read_request(request, DetokenizeRequest)
    tokenizer = find_model(request, body.model).engine.tokenizer
    check_ids("tokens", body.tokens, tokenizer.size)
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special=False)}


@public.get("/health")
async def health(request: Request) -> dict[str, str]:
    gate: Gate = request.app.state.gate
    if gate.closed:
        raise ApiError(503, "The server is going down.", code="draining", retry_after=5)
    return {"status": "ok"}


@public.get("/ping")
async def ping(request: Request) -> dict[str, str]:
    return await health(request)


@public.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@public.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> PlainTextResponse:
    text = render_metrics(models_of(request).engines, request.app.state.metrics)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")
