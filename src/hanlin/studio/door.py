"""The door before the pages: who has the server's key shows it once, and a cookie opens from then on.

The cookie holds no key but its HMAC, for this server's pages only; scripts cannot read it, other sites cannot send it.
The routes of the interface are not the door's concern: they ask for the key themselves.
"""

import asyncio
import hashlib
import hmac
from html import escape
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hanlin.serve.access import same_key
from hanlin.studio.words import Language, preferred_language, say

COOKIE = "hanlin_door"
SMALL = {"/health", "/ping", "/metrics", "/version", "/openapi.json"}
INTERFACE = {*SMALL, "/tokenize", "/detokenize", "/rerank", "/score"}
WRONG_KEY_PAUSE = 0.5  # seconds: guessing is slow
STYLE = Path(__file__).with_name("door.css")


class Door:
    """ASGI middleware: lets through the interface and those with the cookie; shows everybody else the key page."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key
        self._ticket = hmac.new(key.encode(), b"hanlin studio", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _is_interface(scope["path"])):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            headers = dict(scope["headers"])
            request = Request({**scope, "type": "http", "headers": list(headers.items()), "method": "GET"})
            if self._knows(request):
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        request = Request(scope, receive)
        if scope["path"] == "/enter" and request.method == "POST":
            await (await self._enter(request))(scope, receive, send)
        elif self._knows(request):
            await self._app(scope, receive, send)
        else:
            await self._ask(request, wrong=False)(scope, receive, send)

    def _knows(self, request: Request) -> bool:
        return same_key(request.cookies.get(COOKIE, ""), self._ticket)

    async def _enter(self, request: Request) -> Response:
        raw = b""
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > 4096:
                return self._ask(request, wrong=True)
        shown = parse_qs(raw.decode("utf-8", "replace")).get("key", [""])[0]
        if not same_key(shown, self._key):
            await asyncio.sleep(WRONG_KEY_PAUSE)
            return self._ask(request, wrong=True)
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(COOKIE, self._ticket, max_age=30 * 24 * 3600, httponly=True, samesite="strict")
        return response

    def _ask(self, request: Request, *, wrong: bool) -> Response:
        chosen = request.cookies.get("hanlin_language")
        accepted = preferred_language(request.headers.get("accept-language"))
        language: Language = "zh" if (chosen or accepted) == "zh" else "en"
        return HTMLResponse(_key_page(language, wrong=wrong), status_code=401)


def _is_interface(path: str) -> bool:
    return path in INTERFACE or path.startswith("/v1/")


def _key_page(language: Language, *, wrong: bool) -> str:
    complaint = f'<p class="wrong" role="alert">{escape(say("key_wrong", language))}</p>' if wrong else ""
    return f"""<!doctype html>
<html lang="{language}"><head><meta charset="utf-8"><title>Hanlin 翰林</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE.read_text(encoding="utf-8")}</style></head>
<body><form method="post" action="/enter"><div class="seal">翰</div><h1>{escape(say("title", language))}</h1>
<p>{escape(say("key_ask", language))}</p>{complaint}
<input type="password" name="key" autofocus required autocomplete="current-password" \
aria-label="{escape(say("key", language))}" placeholder="{escape(say("key", language))}">
<button>{escape(say("enter", language))}</button></form></body></html>"""
