"""`create_app`: models behind an OpenAI-compatible HTTP interface.

    GET  /v1/models  /v1/models/{id}          POST /v1/chat/completions  /v1/completions
    GET  /health  /metrics  /version          POST /tokenize  /detokenize

With a key, everything but /health, /metrics and /version asks for it. The interactive pages of FastAPI stay off, for
they load their script from another host; the schema is at /openapi.json.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.routing import Match

from hanlin import __version__
from hanlin.engine import Engine
from hanlin.serve import chat, completions
from hanlin.serve.access import require_key
from hanlin.serve.errors import ApiError, install_error_handlers
from hanlin.serve.metrics import ModelMetrics, render_metrics
from hanlin.serve.models import Models, models_of
from hanlin.serve.requests import DetokenizeRequest, TokenizeRequest, read_request
from hanlin.serve.streaming import describe_body

NO_TELEMETRY: Any = {"auto_configure": False, "tracing": False, "metrics": False, "logs": False}

guarded = APIRouter()
public = APIRouter()
INTERFACE = (guarded, chat.router, completions.router)
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def create_app(engines: Mapping[str, Engine], *, api_key: str | None = None) -> FastAPI:
    """The application that offers each engine under its name; the first is used where a request names none.

    The caller keeps the engines and closes them. Further routes (the chat page) may be added to the app.
    """
    app = FastAPI(
        title="Hanlin", version=__version__, docs_url=None, redoc_url=None, telemetry=NO_TELEMETRY
    )  # telemetry: FastAPI would export spans if the environment asked for it; this server reports to nobody
    app.state.models = Models(dict(engines))
    app.state.metrics = {name: ModelMetrics() for name in engines}
    app.state.api_key = api_key
    install_error_handlers(app)
    for router in INTERFACE:
        app.include_router(router, dependencies=[Depends(require_key)])
    app.include_router(public)
    app.add_api_route("/v1/{path:path}", _no_such_route, methods=METHODS, include_in_schema=False)
    return app


@guarded.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    models = models_of(request)
    return {"object": "list", "data": [models.describe(name) for name in models.engines]}


@guarded.get("/v1/models/{model:path}")
async def show_model(request: Request, model: str) -> dict[str, Any]:
    models = models_of(request)
    return models.describe(models.find(model)[0])


@guarded.post("/tokenize", openapi_extra=describe_body(TokenizeRequest))
async def tokenize(request: Request) -> dict[str, Any]:
    body = await read_request(request, TokenizeRequest)
    _, engine = models_of(request).find(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Send either 'prompt' or 'messages'.", param="prompt", code="invalid_value")
    if body.messages is None:
        ids = await asyncio.to_thread(engine.tokenizer.prompt, body.prompt or "")
    else:
        ids = await asyncio.to_thread(engine.tokenizer.chat, [message.as_dict() for message in body.messages])
    return {"count": len(ids), "max_model_len": engine.max_context, "tokens": ids}


@guarded.post("/detokenize", openapi_extra=describe_body(DetokenizeRequest))
async def detokenize(request: Request) -> dict[str, Any]:
    body = await read_request(request, DetokenizeRequest)
    _, engine = models_of(request).find(body.model)
    for token in body.tokens:
        if not 0 <= token < engine.tokenizer.size:
            message = f"'tokens' has {token}; this model's ids go from 0 to {engine.tokenizer.size - 1}."
            raise ApiError(400, message, param="tokens", code="invalid_value")
    return {"prompt": await asyncio.to_thread(engine.tokenizer.decode, body.tokens, skip_special=False)}


@public.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@public.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@public.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> PlainTextResponse:
    text = render_metrics(models_of(request).engines, request.app.state.metrics)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _no_such_route(request: Request) -> JSONResponse:
    """Below /v1 a wrong address or method is answered in the interface's format, whatever page is mounted."""
    known = [route for router in INTERFACE for route in router.routes]
    if any(route.matches(request.scope)[0] is Match.PARTIAL for route in known):
        raise ApiError(405, f"{request.method} {request.url.path}: this address needs another method.")
    raise ApiError(404, f"{request.method} {request.url.path}: there is no such address.", code="unknown_url")
