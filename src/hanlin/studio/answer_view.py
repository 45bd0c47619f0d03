"""An answer on the page: text that grows, a card at the token under the pointer, and a line of figures below.

The text stands in sheets. Only the last is sent again while the answer grows; a sheet that has become long is left as
it is, and a new one continues it.
"""

import json
from collections.abc import Callable

from nicegui import events, ui

from hanlin.studio.conversation import Answer
from hanlin.studio.rendering import find_sheet_end, render_answer
from hanlin.studio.words import Language, say

# The browser tells which token is under the pointer and where that token is.
POINT = """(event) => {
  const token = event.target.closest("[data-i]");
  if (!token) return;
  const box = token.getClientRects()[0];
  emit({i: Number(token.dataset.i), left: box.left, top: box.top, bottom: box.bottom, height: window.innerHeight});
}"""

COPY = """(text) => {
  if (navigator.clipboard) { navigator.clipboard.writeText(text); return; }
  const area = document.createElement("textarea");
  area.value = text; document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
}"""


class AnswerView:
    """Built in the current container; call `refresh` when the answer has grown.

    on_point(answer, event arguments or None): the pointer is on a token, or left the text.
    """

    def __init__(
        self,
        answer: Answer,
        language: Language,
        *,
        context: int,
        on_point: Callable[[Answer, dict[str, float] | None], None],
        on_again: Callable[[], object] | None,
    ) -> None:
        self.answer = answer
        self._language = language
        self._context = context
        self._sheet_begin = 0
        with ui.element("article").classes("hl-answer"):
            ui.element("div").classes("hl-seal small").props('aria-hidden="true"')
            with ui.element("div").classes("hl-answer-column"):
                self._text = ui.element("div").classes("hl-text").props('aria-live="polite"')
                self._text.on("mouseover", lambda event: on_point(answer, _arguments(event)), js_handler=POINT)
                self._text.on("click", lambda event: on_point(answer, _arguments(event)), js_handler=POINT)
                self._text.on("mouseleave", lambda: on_point(answer, None), args=[])
                with self._text:
                    self._sheet = ui.html("", sanitize=False, tag="span")
                self._notice = ui.label().classes("hl-notice")
                with ui.element("div").classes("hl-footer") as self._footer:
                    copied = say("copied", language)
                    ui.button(icon="content_copy", on_click=lambda: self._copy(copied), color=None).props(
                        f'flat round dense size=sm aria-label="{say("copy", language)}"'
                    ).tooltip(say("copy", language))
                    if on_again is not None:
                        ui.button(icon="refresh", on_click=on_again, color=None).props(
                            f'flat round dense size=sm aria-label="{say("regenerate", language)}"'
                        ).tooltip(say("regenerate", language))
                    self._figures = ui.label().classes("hl-figures")
        self.refresh()

    def refresh(self) -> None:
        """Show the answer as it is now."""
        answer = self.answer
        running = answer.ended is None and not answer.notice
        end = find_sheet_end(answer.text, self._sheet_begin) if running else None
        if end is not None:
            self._sheet.set_content(render_answer(answer.text, answer.pieces, begin=self._sheet_begin, end=end))
            self._sheet_begin = end
            with self._text:
                self._sheet = ui.html("", sanitize=False, tag="span")
        self._sheet.set_content(render_answer(answer.text, answer.pieces, begin=self._sheet_begin))
        self._text.classes(add="running" if running else "", remove="" if running else "running")
        notices = [say("forgotten", self._language, n=self._context)] if answer.forgot else []
        notices += [answer.notice] if answer.notice else []
        if answer.ended is not None and not answer.text and not answer.notice:
            notices.append(say("empty", self._language))
        self._notice.set_text(" ".join(notices))
        self._notice.set_visibility(bool(notices))
        self._footer.set_visibility(not running)
        self._figures.set_text(" · ".join(self._describe()))

    def _describe(self) -> list[str]:
        usage = self.answer.usage
        if usage is None:
            return []
        figures = [say("tokens", self._language, n=usage.completion_tokens)]
        rate = self.answer.tokens_per_second
        if rate is not None:
            figures.append(say("speed", self._language, rate=f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"))
        figures.append(say("first_token", self._language, seconds=f"{usage.first_token_s:.2f}"))
        if self.answer.ended in ("length", "abort"):
            figures.append(say(f"ended_{self.answer.ended}", self._language))
        return figures

    async def _copy(self, copied: str) -> None:
        ui.run_javascript(f"({COPY})({json.dumps(self.answer.text)})")
        ui.notify(copied, position="top", timeout=1200)


def _arguments(event: events.GenericEventArguments) -> dict[str, float]:
    return event.args
