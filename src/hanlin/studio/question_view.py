"""A question on the page: its text, the pager of its variants, and the field in which it can be edited."""

import json
from collections.abc import Awaitable, Callable

from nicegui import background_tasks, ui

from hanlin.studio.pager import build_icon, build_pager
from hanlin.studio.words import Language, say

# Enter sends, Shift+Enter breaks the line; while an input method composes a word, Enter belongs to it.
ENTER = """(event) => {
  if (event.key === "Escape") emit(null);
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  emit(event.target.value);
}"""

COPY = """(text) => {
  if (navigator.clipboard) { navigator.clipboard.writeText(text); return; }
  const area = document.createElement("textarea");
  area.value = text; document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
}"""


def copy_text(text: str, language: Language) -> None:
    """Into the visitor's clipboard, also where the page is served without TLS."""
    ui.run_javascript(f"({COPY})({json.dumps(text)})")
    ui.notify(say("copied", language), position="top", timeout=1200)


class QuestionView:
    """Built in the current container.

    variant: which of how many. on_show(index): another variant is wanted; on_edit(text): the edited question is sent.
    """

    def __init__(
        self,
        question: str,
        language: Language,
        *,
        variant: tuple[int, int],
        on_show: Callable[[int], object],
        on_edit: Callable[[str], Awaitable[object]],
    ) -> None:
        self._question, self._language = question, language
        self._variant, self._on_show, self._on_edit = variant, on_show, on_edit
        self._row = ui.element("div").classes("hl-question-row")
        self._show()

    def _show(self) -> None:
        self._row.clear()
        self._row.classes(remove="editing")
        with self._row:
            ui.label(self._question).classes("hl-question")
            with ui.element("div").classes("hl-tools"):
                language = self._language
                build_icon("content_copy", say("copy", language), lambda: copy_text(self._question, language))
                build_icon("edit", say("edit", language), self._edit)
                build_pager(*self._variant, language, self._on_show)

    def _edit(self) -> None:
        self._row.clear()
        self._row.classes(add="editing")
        with self._row:
            field = ui.textarea(value=self._question).classes("hl-edit")
            field.props(f'outlined dense autogrow autofocus aria-label="{say("edit", self._language)}"')
            field.on("keydown", lambda event: self._key(event.args), js_handler=ENTER)
            with ui.element("div").classes("hl-edit-buttons"):
                ui.label(say("edit_hint", self._language)).classes("hl-edit-hint")
                cancel = ui.button(say("cancel", self._language), on_click=self._show, color=None)
                cancel.props("flat no-caps dense").classes("hl-cancel")
                resend = ui.button(say("resend", self._language), on_click=lambda: self._send(field.value), color=None)
                resend.props("unelevated no-caps dense").classes("hl-resend")

    def _key(self, text: str | None) -> None:
        if text is None:
            self._show()
        else:
            background_tasks.create(self._send(text), name="edit")

    async def _send(self, text: str | None) -> None:
        if (text or "").strip():
            await self._on_edit((text or "").strip())
