"""An answer on the page: text that grows, a card at the token under the pointer, and a line of figures below.

The text stands in sheets. Only the last is sent again while the answer grows; a sheet that has become long is left as
it is, and a new one continues it.
"""

from collections.abc import Callable

from nicegui import events, ui

from hanlin.studio.answer import Answer
from hanlin.studio.pager import build_icon, build_pager
from hanlin.studio.question_view import COPY, copy_text
from hanlin.studio.rendering import find_sheet_end, render_answer
from hanlin.studio.words import Language, say

# The browser tells which token is under the pointer and where that token is.
POINT = """(event) => {
  const token = event.target.closest("[data-i]");
  if (!token) return;
  const box = token.getClientRects()[0];
  emit({i: Number(token.dataset.i), left: box.left, top: box.top, bottom: box.bottom, height: window.innerHeight});
}"""

COPY_CODE = f"""(event) => {{
  const button = event.target.closest(".md-copy");
  if (!button) return;
  ({COPY})(button.closest(".md-fence").querySelector("code").textContent);
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1200);
}}"""


class AnswerView:
    """Built in the current container; call `refresh` when the answer has grown.

    title: the model's name, where it must be said. variant: which of how many answers. on_point(answer, event arguments
    or None): the pointer is on a token, or left the text. on_again: another answer is wanted. on_show(index): one of
    those that are there.
    """

    def __init__(
        self,
        answer: Answer,
        language: Language,
        *,
        context: int,
        title: str,
        variant: tuple[int, int],
        on_point: Callable[[Answer, dict[str, float] | None], None],
        on_again: Callable[[], object],
        on_show: Callable[[int], object],
    ) -> None:
        self.answer = answer
        self._language = language
        self._context = context
        self._sheet_begin = 0
        with ui.element("article").classes("hl-answer"):
            ui.element("div").classes("hl-seal small").props('aria-hidden="true"')
            with ui.element("div").classes("hl-answer-column"):
                if title:
                    ui.label(title).classes("hl-answerer")
                self._text = ui.element("div").classes("hl-text").props('aria-live="polite"')
                self._text.on("mouseover", lambda event: on_point(answer, _arguments(event)), js_handler=POINT)
                self._text.on("click", lambda event: on_point(answer, _arguments(event)), js_handler=POINT)
                self._text.on("click", js_handler=COPY_CODE)
                self._text.on("mouseleave", lambda: on_point(answer, None), args=[])
                self._sheet = self._add_sheet()
                self._notice = ui.label().classes("hl-notice")
                with ui.element("div").classes("hl-footer") as self._footer:
                    with ui.element("div").classes("hl-tools"):
                        build_icon("content_copy", say("copy", language), lambda: copy_text(answer.text, language))
                        build_icon("refresh", say("regenerate", language), on_again)
                        build_pager(*variant, language, on_show)
                    self._figures = ui.label().classes("hl-figures")
        self.refresh()

    @property
    def open_characters(self) -> int:
        """How many a refresh sends again."""
        return len(self.answer.text) - self._sheet_begin

    def refresh(self) -> None:
        """Show the answer as it is now."""
        answer = self.answer
        end = find_sheet_end(answer.text, self._sheet_begin) if answer.running else None
        if end is not None:
            self._sheet.set_content(render_answer(answer.text, answer.pieces, begin=self._sheet_begin, end=end))
            self._sheet_begin = end
            self._sheet = self._add_sheet()
        markup = render_answer(answer.text, answer.pieces, begin=self._sheet_begin, growing=answer.running)
        self._sheet.set_content(markup)
        self._text.classes(add="running" if answer.running else "", remove="" if answer.running else "running")
        notices = [say("forgotten", self._language, n=self._context)] if answer.forgot else []
        notices += [answer.notice] if answer.notice else []
        if answer.ended is not None and not answer.text and not answer.notice:
            notices.append(say("empty", self._language))
        self._notice.set_text(" ".join(notices))
        self._notice.set_visibility(bool(notices))
        self._footer.set_visibility(not answer.running)
        self._figures.set_text(" · ".join(self._describe()))

    def _add_sheet(self) -> ui.html:
        with self._text:
            return ui.html("", sanitize=False).classes("hl-sheet")  # render_answer writes no markup but its own

    def _describe(self) -> list[str]:
        usage = self.answer.usage
        if usage is None:
            return []
        figures = [say("tokens", self._language, n=usage.completion_tokens)]
        rate = self.answer.tokens_per_second
        if rate is not None:
            figures.append(say("speed", self._language, rate=f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"))
        figures.append(say("first_token", self._language, seconds=f"{usage.first_token_s:.2f}"))
        key = "prompt_cached" if usage.cached_tokens else "prompt"
        figures.append(say(key, self._language, n=usage.prompt_tokens, cached=usage.cached_tokens))
        if self.answer.ended in ("length", "abort"):
            figures.append(say(f"ended_{self.answer.ended}", self._language))
        return figures


def _arguments(event: events.GenericEventArguments) -> dict[str, float]:
    return event.args
