"""The card beside the token under the pointer: its probability and its rivals."""

from nicegui import ui

from hanlin.studio.answer import Answer
from hanlin.studio.rendering import render_alternatives

HEIGHT = 250  # pixels that a card needs below its token


class TokenCard:
    """One for the whole page, built in the current container; hidden until something is pointed at."""

    def __init__(self) -> None:
        self._card = ui.element("div").classes("hl-card").props('role="tooltip"')
        with self._card:
            self._body = ui.html("", sanitize=False)

    def show(self, answer: Answer, where: dict[str, float] | None, note: str) -> None:
        """Beside the token `where["i"]`, below it, or above where there is no room below. None hides the card."""
        if where is None or answer.tokenizer is None or not 0 <= where["i"] < len(answer.pieces):
            self.hide()
            return
        self._body.set_content(render_alternatives(answer.pieces[int(where["i"])], answer.tokenizer, note))
        below = where["bottom"] + HEIGHT < where["height"]
        vertical = f"top:{where['bottom'] + 6:.0f}px" if below else f"bottom:{where['height'] - where['top'] + 6:.0f}px"
        self._card.style(replace=f"left:clamp(8px, {where['left'] - 24:.0f}px, calc(100vw - 276px));{vertical}")
        self._card.classes(add="shown")

    def hide(self) -> None:
        self._card.classes(remove="shown")
