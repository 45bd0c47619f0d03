"""Put the chat page at `/` of a server's app."""

from collections.abc import Sequence

from fastapi import FastAPI, Request
from nicegui import ui

from hanlin.studio.chat_model import ChatModel
from hanlin.studio.frame import SEAL, TITLE, begin_page, mount_pages
from hanlin.studio.page import ChatPage


def mount_chat(app: FastAPI, models: Sequence[ChatModel], *, api_key: str | None = None) -> None:
    """Add the page to an app made by `serve.create_app`. Once a process (`studio.frame`)."""

    async def chat_page(request: Request) -> None:
        language, dark = begin_page(request)
        ChatPage(models, language, metrics=app.state.metrics).build(dark=dark)

    ui.page("/", title=TITLE, favicon=SEAL, dark=None)(chat_page)
    mount_pages(app, api_key=api_key)
