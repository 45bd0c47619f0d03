"""Saving a conversation to the visitor's disk and opening it from there. Nothing is written on the server."""

import asyncio
import time
from collections.abc import Callable

from nicegui import events, ui

from hanlin.core.errors import HanlinError
from hanlin.studio.portable import LARGEST, Talk, read_json, write_json, write_markdown
from hanlin.studio.words import Language, say

PICK_FILE = "() => document.querySelector('.hl-upload input[type=file]').click()"


def build_upload(language: Callable[[], Language], on_open: Callable[[Talk], object]) -> None:
    """The hidden field behind the menu's "open"; once a page."""

    def refuse(why: object) -> None:
        ui.notify(say("import_failed", language(), why=why), position="top", type="negative", multi_line=True)

    async def read(event: events.UploadEventArguments) -> None:
        upload.reset()
        if event.file.size() > LARGEST:  # the browser was asked to see to it
            refuse(limit)
            return
        try:
            talk = await asyncio.to_thread(read_json, await event.file.read())
        except HanlinError as error:
            refuse(error)
            return
        on_open(talk)

    limit = f"≤ {LARGEST // 1_000_000} MB, .json"
    upload = ui.upload(on_upload=read, auto_upload=True, max_file_size=LARGEST).classes("hl-upload")
    upload.props('accept=".json" aria-hidden="true"').on_rejected(lambda: refuse(limit))


def build_entries(language: Language, talk: Callable[[], Talk]) -> None:
    """The menu's entries, in the current menu."""

    def save(text: str, ending: str, kind: str) -> None:
        name = f"hanlin-{time.strftime('%Y%m%d-%H%M%S')}.{ending}"
        ui.download(text.encode(), name, f"{kind}; charset=utf-8")

    def save_markdown() -> None:
        made = say("exported", language, when=time.strftime("%Y-%m-%d %H:%M"))
        text = write_markdown(talk(), user=say("user", language), system=say("system", language), made=made)
        save(text, "md", "text/markdown")

    ui.menu_item(say("export_json", language), lambda: save(write_json(talk()), "json", "application/json"))
    ui.menu_item(say("export_markdown", language), save_markdown)
    ui.menu_item(say("import", language)).on("click", js_handler=PICK_FILE)
