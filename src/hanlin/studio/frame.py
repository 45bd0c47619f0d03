"""What all pages of the studio share: the head, the visitor's language and look, and how they get into an app.

Everything a page loads comes from this process. With a key, nothing of it, its socket included, answers before the
visitor has shown the key once (`door.py`).
"""

import json
import warnings
from pathlib import Path

from fastapi import FastAPI, Request
from nicegui import ui

from hanlin.studio.door import Door
from hanlin.studio.words import Language, preferred_language

TITLE = "Hanlin 翰林"
SEAL = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="64" rx="14" fill="#b3382c"/>'
    '<text x="32" y="47" font-size="42" text-anchor="middle" fill="#fff8ef" '
    'font-family="Noto Serif CJK SC,Songti SC,SimSun,serif" font-weight="700">翰</text></svg>'
)
# Whatever a page shows, the browser fetches nothing for it from anywhere else (NiceGUI needs inline scripts and eval).
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; base-uri 'self'"
STYLE = Path(__file__).with_name("chat.css")
COOKIE_AGE = 365 * 24 * 3600
IS_DARK = "() => emit(document.body.classList.contains('body--dark'))"


def begin_page(request: Request) -> tuple[Language, bool | None]:
    """The head of a page; its language, and whether it is dark (None: as the system has it)."""
    ui.add_head_html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">')
    ui.add_css(STYLE)
    ui.colors(primary="#b3382c")
    wanted = request.cookies.get("hanlin_language")
    language: Language = preferred_language(request.headers.get("accept-language"))
    if wanted in ("en", "zh"):
        language = "zh" if wanted == "zh" else "en"
    return language, {"dark": True, "light": False}.get(request.cookies.get("hanlin_look", ""))


def mount_pages(app: FastAPI, *, api_key: str | None = None) -> None:
    """Put the pages that were declared with `ui.page` into an app. Once a process: NiceGUI keeps them in one place."""
    ui.run_with(
        app,
        title=TITLE,
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


def remember_language(language: Language) -> None:
    """In a cookie of this visitor's, and for what reads the page aloud."""
    lang = {"en": "en", "zh": "zh-CN"}[language]
    ui.run_javascript(
        f"document.cookie = 'hanlin_language={language};path=/;max-age={COOKIE_AGE};samesite=strict';"
        f"document.documentElement.lang = {json.dumps(lang)};"
    )


def remember_look(dark: bool) -> None:
    """Light or dark, in a cookie of this visitor's."""
    name = "dark" if dark else "light"
    ui.run_javascript(f"document.cookie = 'hanlin_look={name};path=/;max-age={COOKIE_AGE};samesite=strict'")
