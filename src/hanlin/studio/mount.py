"""Put the chat page at `/` of a server's app.

Everything the page loads comes from this process. With a key, nothing of it, its socket included, answers before the
visitor has shown the key once (`door.py`).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI, Request
from nicegui import ui

from hanlin.studio.chat_model import ChatModel
from hanlin.studio.door import Door
from hanlin.studio.page import ChatPage
from hanlin.studio.words import Language, preferred_language

SEAL = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="64" rx="14" fill="#b3382c"/>'
    '<text x="32" y="47" font-size="42" text-anchor="middle" fill="#fff8ef" '
    'font-family="Noto Serif CJK SC,Songti SC,SimSun,serif" font-weight="700">翰</text></svg>'
)
# Whatever a page shows, the browser fetches nothing for it from anywhere else (NiceGUI needs inline scripts and eval).
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; base-uri 'self'"
STYLE = Path(__file__).with_name("chat.css")


def mount_chat(app: FastAPI, models: Sequence[ChatModel], *, api_key: str | None = None) -> None:
    """Add the page to an app made by `serve.create_app`. Once a process: NiceGUI keeps its pages in one place."""

    async def chat_page(request: Request) -> None:
        ui.add_head_html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">')
        ui.add_css(STYLE)
        ui.colors(primary="#b3382c")
        wanted = request.cookies.get("hanlin_language")
        language: Language = preferred_language(request.headers.get("accept-language"))
        if wanted in ("en", "zh"):
            language = "zh" if wanted == "zh" else "en"
        dark = {"dark": True, "light": False}.get(request.cookies.get("hanlin_look", ""))
        ChatPage(models, language, metrics=app.state.metrics).build(dark=dark)

    ui.page("/", title="Hanlin 翰林", favicon=SEAL, dark=None)(chat_page)
    ui.run_with(
        app,
        title="Hanlin 翰林",
        favicon=SEAL,
        dark=None,
        reconnect_timeout=10.0,
        show_welcome_message=False,
        tailwind=False,
    )
    # At its start NiceGUI looks at every object of the process, at torch's deprecated names too.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.reduce_op", category=FutureWarning)
    if api_key is not None:
        app.add_middleware(Door, key=api_key)
