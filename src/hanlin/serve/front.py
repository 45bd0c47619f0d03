"""`create_front`: one address before several replicas of the same application (`app.create_app`).

    client ──▶ front: key, place, where its prompt was read before ──▶ one replica ──▶ its answer, piece by piece
                 /metrics, /v1/responses/ID                        ──▶ all of them

A replica that dies under a request: if nothing of the answer has left, another replica is asked, once, for a request
that kills its replica should not kill them all; if some has, a stream ends with an error, and any other answer is cut
off before its announced length. A client that hangs up ends its answer in the replica.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive, Scope, Send

from hanlin import __version__
from hanlin.serve.access import require_key, take_place
from hanlin.serve.affinity import beginning_of
from hanlin.serve.answers import server_sent_event
from hanlin.serve.app import COMPUTING, METHODS, NO_TELEMETRY
from hanlin.serve.errors import ApiError, anthropic_body, error_body, install_error_handlers
from hanlin.serve.fleet import Ask, Fleet, ReplicaLostError
from hanlin.serve.limits import Gate, Key
from hanlin.serve.requests import read_body

TRIES = 2
LOST = "The replica that was computing this answer is lost. Ask again."


def create_front(fleet: Fleet, *, api_key: str | None = None, keys: Iterable[Key] = ()) -> FastAPI:
    """The application before the replicas; keys as in `create_app`. Limits on requests under way act here, once."""
    app = FastAPI(title="Hanlin", version=__version__, docs_url=None, redoc_url=None, openapi_url=None,
                  telemetry=NO_TELEMETRY)  # fmt: skip
    app.state.fleet = fleet
    app.state.gate = Gate([*([] if api_key is None else [Key(api_key, "api-key")]), *keys])
    install_error_handlers(app)
    key, place = Depends(require_key), Depends(take_place)
    for path in ("/health", "/ping"):
        app.add_api_route(path, _health)
    app.add_api_route("/metrics", _metrics)
    app.add_api_route("/version", _ask_one)
    app.add_api_route("/openapi.json", _ask_one)
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        app.add_api_route(path, _refuse_adapters, methods=["POST"], dependencies=[key])
    app.add_api_route("/v1/responses/{rest:path}", _ask_owner, methods=METHODS, dependencies=[key])
    paths = {route.path for router in COMPUTING for route in router.routes if isinstance(route, APIRoute)}
    for path in sorted(paths):
        app.add_api_route(path, _ask_one, methods=["POST"], dependencies=[key, place])
    app.add_api_route("/{path:path}", _ask_one, methods=METHODS, dependencies=[key])
    return app


async def _health(request: Request) -> JSONResponse:
    """Well while any replica answers."""
    if request.app.state.gate.closed:
        raise ApiError(503, "The server is going down.", code="draining", retry_after=5)
    answers = await request.app.state.fleet.ask_all(_get("/health"))
    well = sum(answer.status == 200 for answer in answers.values())
    if not well:
        raise ApiError(503, "No replica is running at the moment.", code="no_replica", retry_after=5)
    return JSONResponse({"status": "ok", "replicas": well})


async def _metrics(request: Request) -> PlainTextResponse:
    answers = await request.app.state.fleet.ask_all(_get("/metrics"))
    well = sorted((answer.number, answer.body.decode()) for answer in answers.values() if answer.status == 200)
    text = merge_metrics({str(number): text for number, text in well})
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def merge_metrics(texts: Mapping[str, str]) -> str:
    """Prometheus texts of several replicas as one: each sample gains the label `replica`, each family stands once."""
    families: dict[str, list[str]] = {}
    for name, text in texts.items():
        head = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                head = line
            elif line.startswith("# TYPE "):
                head = f"{head}\n{line}"
                families.setdefault(head, [])
            elif line:
                label = f'replica="{name}"'
                bare = re.sub(r"^([\w:]+) ", r"\1{} ", line)
                families[head].append(bare.replace("{", f"{{{label}" + ("" if "{}" in bare else ","), 1))
    return "".join(f"{head}\n" + "".join(f"{line}\n" for line in lines) for head, lines in families.items())


async def _refuse_adapters() -> None:
    message = "With --replicas, adapters are given at the start (--adapter NAME=FOLDER): one that came later would be "
    raise ApiError(403, message + "missing from a replica that is replaced.", code="not_allowed")


async def _ask_one(request: Request) -> Response:
    """Where the prompt's beginning was read before."""
    fleet: Fleet = request.app.state.fleet
    ask = await _read(request)
    body: Any = None
    if request.method == "POST" and ask.body:
        with contextlib.suppress(ValueError, RecursionError):  # the replica says what is wrong with it
            body = json.loads(ask.body)
        ask = replace(ask, key=beginning_of(body))
    if request.url.path == "/v1/responses" and isinstance(body, dict) and body.get("previous_response_id"):
        where = await _keeper(fleet, request, str(body["previous_response_id"]))
        ask = replace(ask, replica=where)
    return Relayed(fleet, ask)


async def _ask_owner(request: Request) -> Response:
    """A kept answer lies in the one replica that gave it: all are asked, and the others know nothing of it."""
    answers = await request.app.state.fleet.ask_all(await _read(request))
    if not answers:
        raise ApiError(503, "No replica is running at the moment.", code="no_replica", retry_after=5)
    found = min(answers.values(), key=lambda answer: answer.status == 404)
    response = Response(found.body, found.status)
    response.raw_headers = found.headers
    return response


async def _keeper(fleet: Fleet, request: Request, response_id: str) -> str | None:
    """The replica that remembers an answer; None if none does, and any of them will say so."""
    if not re.fullmatch(r"[\w-]{1,200}", response_id):
        return None
    ask = _get(f"/v1/responses/{response_id}", request.scope["headers"])
    answers = await fleet.ask_all(ask)
    return next((name for name, answer in answers.items() if answer.status == 200), None)


def _get(path: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> Ask:
    kept = [(name, value) for name, value in headers if name in (b"authorization", b"x-api-key")]
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": kept, "http_version": "1.1", "scheme": "http"}  # fmt: skip
    return Ask(scope)


async def _read(request: Request) -> Ask:
    """A request with its whole body, or `ApiError` 413."""
    body = await read_body(request)
    plain = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "client", "server")
    scope = {name: request.scope[name] for name in plain if name in request.scope}
    return Ask(scope | {"headers": list(request.scope["headers"])}, body)


class Relayed(Response):
    """An answer that comes from a replica."""

    def __init__(self, fleet: Fleet, ask: Ask) -> None:
        super().__init__()
        self._fleet, self._ask = fleet, ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def hung_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        passing = asyncio.create_task(self._relay(scope, receive, send))
        watching = asyncio.create_task(hung_up())
        try:
            await asyncio.wait({passing, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (passing, watching):
                task.cancel()
            await asyncio.wait({passing, watching})
        if not passing.cancelled():
            passing.result()

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        head: Message | None = None
        for _ in range(TRIES):
            try:
                async with contextlib.aclosing(self._fleet.ask(self._ask)) as messages:
                    async for message in messages:
                        head = head or message
                        await send(message)
                return None
            except ReplicaLostError:
                if head is not None:
                    return await self._break_off(head, send)
        status, body = 503, error_body(LOST, status=503, code="replica_lost")
        if self._ask.scope["path"].startswith("/v1/messages"):
            body = anthropic_body(status, body)
        return await JSONResponse(body, status, {"Retry-After": "1"})(scope, receive, send)

    async def _break_off(self, head: Message, send: Send) -> None:
        """The status has left: a stream can still say what happened, in the form of its interface."""
        kind = dict(head.get("headers", ())).get(b"content-type", b"")
        if not kind.startswith(b"text/event-stream"):
            return  # too short for its announced length: the client's library reports it
        path, body = self._ask.scope["path"], error_body(LOST, status=503, code="replica_lost")
        if path.startswith("/v1/messages"):
            line = server_sent_event(anthropic_body(503, body), name="error")
        elif path.startswith("/v1/responses"):
            line = server_sent_event({**body["error"], "type": "error"}, name="error")
        else:
            line = server_sent_event(body)
        await send({"type": "http.response.body", "body": line, "more_body": False})
