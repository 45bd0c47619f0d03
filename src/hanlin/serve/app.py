"""`create_app`: models behind HTTP, in the forms that clients know.

    POST /v1/chat/completions  /v1/completions  /v1/embeddings      OpenAI
    POST /v1/responses   GET, DELETE /v1/responses/{id}   POST /v1/responses/{id}/cancel
    GET  /v1/models  /v1/models/{id}
    POST /v1/messages  /v1/messages/count_tokens                    Anthropic
    POST /rerank  /v1/rerank  /score  /v1/score                     Jina, vLLM
    POST /tokenize  /detokenize  /v1/load_lora_adapter  /v1/unload_lora_adapter
    GET  /health  /ping  /metrics  /version

With keys, everything but the last line asks for one. The interactive pages of FastAPI stay off, for they load their
script from another host; the schema is at /openapi.json.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.routing import Match

from hanlin import __version__
from hanlin.engine import Engine
from hanlin.serve import adapters, anthropic, chat, completions, embeddings, rerank, responses, small
from hanlin.serve.access import require_key, take_place
from hanlin.serve.errors import ApiError, install_error_handlers
from hanlin.serve.limits import Gate, Key
from hanlin.serve.metrics import ModelMetrics
from hanlin.serve.models import Models
from hanlin.serve.store import ResponseStore

NO_TELEMETRY: Any = {"auto_configure": False, "tracing": False, "metrics": False, "logs": False}

# Routes that compute take a place among the requests under way; the others only ask for the key.
COMPUTING = (chat.router, completions.router, embeddings.router, responses.router, anthropic.router, rerank.router)
LOOKING = (small.guarded, responses.kept, anthropic.counting, adapters.router)
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def create_app(
    engines: Mapping[str, Engine],
    *,
    api_key: str | None = None,
    keys: Iterable[Key] = (),
    request_seconds: float | None = None,
    adapter_root: Path | None = None,
    kept_responses: int = 1000,
) -> FastAPI:
    """The application that offers each engine under its name; the first is used where a request names none.

    api_key: one key without limits; keys: several with theirs. request_seconds: an answer that takes longer is given
    up. adapter_root: adapters below this folder may be loaded by clients. kept_responses: how many answers of
    /v1/responses are remembered. The caller keeps the engines and closes them. Further routes (the chat page) may be
    added to the app.
    """
    app = FastAPI(
        title="Hanlin", version=__version__, docs_url=None, redoc_url=None, telemetry=NO_TELEMETRY
    )  # telemetry: FastAPI would export spans if the environment asked for it; this server reports to nobody
    app.state.models = Models(dict(engines))
    app.state.metrics = {name: ModelMetrics() for name in engines}
    app.state.gate = Gate([*([] if api_key is None else [Key(api_key, "api-key")]), *keys])
    app.state.request_seconds = request_seconds
    app.state.adapter_root = adapter_root
    app.state.responses = ResponseStore(kept_responses)
    install_error_handlers(app)
    for router in COMPUTING:
        app.include_router(router, dependencies=[Depends(require_key), Depends(take_place)])
    for router in LOOKING:
        app.include_router(router, dependencies=[Depends(require_key)])
    app.include_router(small.public)
    app.add_api_route("/v1/{path:path}", _no_such_route, methods=METHODS, include_in_schema=False)
    return app


async def _no_such_route(request: Request) -> JSONResponse:
    """Below /v1 a wrong address or method is answered in the interface's format, whatever page is mounted."""
    known = [route for router in (*COMPUTING, *LOOKING) for route in router.routes]
    if any(route.matches(request.scope)[0] is Match.PARTIAL for route in known):
        raise ApiError(405, f"{request.method} {request.url.path}: this address needs another method.")
    raise ApiError(404, f"{request.method} {request.url.path}: there is no such address.", code="unknown_url")
