"""The chat page: one visitor's conversation with the engines of this process."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from nicegui import background_tasks, ui

from hanlin.core.errors import HanlinError
from hanlin.engine import Busy
from hanlin.serve.generation import Generation
from hanlin.serve.metrics import ModelMetrics
from hanlin.studio.answer_view import AnswerView
from hanlin.studio.chat_model import ChatModel
from hanlin.studio.conversation import Answer, Exchange, TooLongError, fit
from hanlin.studio.rendering import render_alternatives
from hanlin.studio.settings import Settings, build_settings
from hanlin.studio.words import Language, choose, say

log = logging.getLogger("hanlin.studio")

REFRESH = 0.06  # seconds between two updates of a growing answer
COOKIE_AGE = 365 * 24 * 3600

# Enter sends, Shift+Enter breaks the line; while an input method composes a word, Enter belongs to it.
ENTER = """(event) => {
  if (event.key === "Escape") emit(null);
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  emit(event.target.value);
}"""

# Keep the cursor in the input, but raise no keyboard on a phone.
FOCUS = "if (matchMedia('(hover: hover)').matches) document.querySelector('.hl-field textarea')?.focus()"

IS_DARK = "() => emit(document.body.classList.contains('body--dark'))"


class ChatPage:
    """State and parts of the page of one visitor. Changing the language builds the parts anew from the state."""

    def __init__(
        self, models: Sequence[ChatModel], language: Language, *, metrics: Mapping[str, ModelMetrics] | None = None
    ) -> None:
        self.models = {model.name: model for model in models}
        self.model = models[0]
        self.language: Language = language
        self.settings = Settings(self.model.sampling)
        self.exchanges: list[Exchange] = []
        self._metrics = metrics or {}
        self._answering = self._stopping = False
        self._generation: Generation | None = None
        self._view: AnswerView | None = None  # of the last answer

    def build(self, *, dark: bool | None) -> None:
        """Put the page into the current client."""
        self._dark = ui.dark_mode(dark)
        self._drawer = (
            ui.right_drawer(value=False).classes("hl-drawer").props("width=320 breakpoint=1180 show-if-above")
        )
        with self._drawer:
            self._drawer_body = ui.element("div").classes("hl-drawer-body")
        self._shell = ui.element("div").classes("hl-shell")
        self._card = ui.element("div").classes("hl-card").props('role="tooltip"')
        with self._card:
            self._card_body = ui.html("", sanitize=False)
        ui.context.client.on_delete(self.stop)
        self._fill()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        self._shell.clear()
        self._hide_card()
        with self._shell:
            self._build_header()
            self._build_scroller()
            self._build_composer()
        self._fill_drawer()
        self._show_running()

    def _fill_drawer(self) -> None:
        self._drawer_body.clear()
        with self._drawer_body:
            with ui.element("div").classes("hl-drawer-head"):
                ui.label(self._say("settings"))
                self._icon_button("close", "close", self._drawer.hide).classes("hl-drawer-close")
            build_settings(
                self.settings,
                self.language,
                context=self.model.engine.max_context,
                on_colour=self._set_coloured,
                on_reset=self._reset,
            )

    def _build_header(self) -> None:
        with ui.element("header").classes("hl-header"):
            ui.element("div").classes("hl-seal").props('aria-hidden="true"')
            ui.label(self._say("title")).classes("hl-title")
            if len(self.models) > 1:
                ui.select(
                    list(self.models), value=self.model.name, on_change=lambda event: self._choose_model(event.value)
                ).props(f'dense borderless options-dense aria-label="{self._say("model")}"').classes("hl-model")
            else:
                ui.label(self.model.name).classes("hl-model-name")
            ui.element("div").classes("hl-space")
            self._icon_button("add_comment", "new", self._clear)
            if self.model.card:
                self._icon_button("info_outline", "about", self._show_about).classes("hl-wide")
            self._icon_button("translate", "language", self._switch_language)
            contrast = self._icon_button("contrast", "dark")
            contrast.on("click", lambda event: self._set_dark(not event.args), js_handler=IS_DARK)
            self._icon_button("tune", "settings", self._drawer.toggle)

    def _build_scroller(self) -> None:
        with ui.element("main").classes("hl-scroller").on("scroll", self._hide_card, args=[], throttle=0.1):
            self._list = ui.element("div").classes("hl-list")
            self._list.classes(add="coloured" if self.settings.coloured else "")
        with self._list:
            if not self.exchanges:
                self._build_welcome()
            for exchange in self.exchanges:
                self._build_exchange(exchange)

    def _build_welcome(self) -> None:
        with ui.element("div").classes("hl-welcome") as self._welcome:
            ui.element("div").classes("hl-seal large").props('aria-hidden="true"')
            ui.label(self._say("greeting")).classes("hl-greeting")
            card = choose(self.model.card, self.language)
            if card:
                with ui.element("section").classes("hl-about"):
                    ui.label(self._say("about")).classes("hl-heading")
                    ui.markdown(card)
            examples = choose(self.model.examples, self.language)
            if examples:
                ui.label(self._say("try")).classes("hl-heading center")
                with ui.element("div").classes("hl-chips"):
                    for text in examples:
                        ui.button(text, on_click=lambda _, text=text: self.send(text), color=None).props(
                            "flat no-caps"
                        ).classes("hl-chip")

    def _build_exchange(self, exchange: Exchange) -> None:
        last = exchange is self.exchanges[-1]
        with ui.element("div").classes("hl-question-row"):
            ui.label(exchange.question).classes("hl-question")
        view = AnswerView(
            exchange.answer,
            self.language,
            context=self.model.engine.max_context,
            on_point=self._point,
            on_again=self._again if last else None,
        )
        if last:
            self._view = view

    def _build_composer(self) -> None:
        with ui.element("footer").classes("hl-composer"):
            with ui.element("div").classes("hl-box"):
                self._input = (
                    ui.textarea(placeholder=self._say("placeholder", name=self.model.name))
                    .props('borderless autogrow dense autofocus input-class="hl-input" rows=1')
                    .classes("hl-field")
                )
                self._input.on("keydown", lambda event: self._key(event.args), js_handler=ENTER)
                self._send = (
                    ui.button(icon="arrow_upward", on_click=lambda: self.send(self._input.value), color=None)
                    .props(f'round unelevated aria-label="{self._say("send")}"')
                    .classes("hl-send")
                )
                self._stop = (
                    ui.button(icon="stop", on_click=self.stop, color=None)
                    .props(f'round unelevated aria-label="{self._say("stop")}"')
                    .classes("hl-send hl-stop")
                )
            ui.label(self._say("footnote")).classes("hl-footnote")

    def _icon_button(self, icon: str, key: str, action: Callable[[], object] | None = None) -> ui.button:
        label = self._say(key)
        return (
            ui.button(icon=icon, on_click=action, color=None)
            .props(f'flat round dense aria-label="{label}"')
            .classes("hl-icon")
            .tooltip(label)
        )

    def _say(self, key: str, **values: object) -> str:
        return say(key, self.language, **values)

    # -- talking -------------------------------------------------------------------------------------------------------

    async def send(self, text: str | None) -> None:
        """Ask a question, unless an answer is under way."""
        question = (text or "").strip()
        if not question or self._answering:
            return
        self._input.value = ""
        ui.run_javascript(FOCUS)
        self.exchanges.append(Exchange(question, Answer(self.model.engine.tokenizer)))
        await self._answer()

    async def _again(self) -> None:
        if self.exchanges and not self._answering:
            self.exchanges[-1].answer = Answer(self.model.engine.tokenizer)
            await self._answer()

    async def _answer(self) -> None:
        """Let the model write the last answer, and show it while it comes."""
        answer, model = self.exchanges[-1].answer, self.model
        self._answering, self._stopping = True, False
        self._rebuild_list()
        self._show_running()
        try:
            fitted = await asyncio.to_thread(
                fit,
                list(self.exchanges),
                system=self.settings.system,
                chat=model.engine.tokenizer.chat,
                context=model.engine.max_context,
                max_tokens=self.settings.sampling.max_tokens,
            )
            answer.forgot = fitted.forgot
            metrics = self._metrics.get(model.name)
            self._generation = Generation(
                model.engine,
                [fitted.ids],
                self.settings.params(max_tokens=fitted.max_tokens),
                watch=metrics.watch() if metrics else None,
            )
            if self._stopping:  # asked for while the prompt was being prepared
                self._generation.abort()
            await self._follow(answer, self._generation)
        except TooLongError as error:
            answer.notice = self._say("too_long", n=model.engine.max_context, needed=error.needed)
        except Busy:
            answer.notice = self._say("busy")
        except HanlinError as error:
            answer.notice = str(error)
        except Exception:
            log.exception("An answer failed.")
            answer.notice = self._say("failed")
        finally:
            self._generation, self._answering = None, False
            self._show_running()
            if self._view is not None:
                self._view.refresh()

    async def _follow(self, answer: Answer, generation: Generation) -> None:
        shown = 0.0
        async with contextlib.aclosing(generation.events()) as events:
            async for _, event in events:
                answer.add(event)
                if time.monotonic() - shown >= REFRESH and self._view is not None:
                    self._view.refresh()
                    shown = time.monotonic()

    def stop(self) -> None:
        """End the answer that is under way; what there is of it stays."""
        self._stopping = True
        if self._generation is not None:
            self._generation.abort()

    # -- what the visitor does besides ---------------------------------------------------------------------------------

    def _key(self, text: str | None) -> None:
        if text is None:
            self.stop()
        else:
            background_tasks.create(self._send_in_place(text), name="send")

    async def _send_in_place(self, text: str) -> None:
        with self._shell:
            await self.send(text)

    def _clear(self) -> None:
        self.stop()
        self.exchanges = []
        self._view = None
        self._rebuild_list()

    def _choose_model(self, name: str) -> None:
        self.stop()
        self.model = self.models[name]
        self.settings.sampling = self.model.sampling
        self._fill()

    def _reset(self) -> None:
        self.settings.sampling = self.model.sampling
        self._fill_drawer()

    def _set_coloured(self, coloured: bool) -> None:
        self.settings.coloured = coloured
        self._list.classes(add="coloured" if coloured else "", remove="" if coloured else "coloured")

    def _switch_language(self) -> None:
        self.language = "zh" if self.language == "en" else "en"
        lang = {"en": "en", "zh": "zh-CN"}[self.language]
        ui.run_javascript(
            f"document.cookie = 'hanlin_language={self.language};path=/;max-age={COOKIE_AGE};samesite=strict';"
            f"document.documentElement.lang = {json.dumps(lang)};"
        )
        self._fill()

    def _set_dark(self, dark: bool) -> None:
        self._dark.value = dark
        name = "dark" if dark else "light"
        ui.run_javascript(f"document.cookie = 'hanlin_look={name};path=/;max-age={COOKIE_AGE};samesite=strict'")

    def _show_about(self) -> None:
        with self._shell, ui.dialog(value=True) as dialog, ui.element("section").classes("hl-about dialog"):
            ui.label(self._say("about")).classes("hl-heading")
            ui.markdown(choose(self.model.card, self.language))
        dialog.on("hide", dialog.delete)

    # -- showing -------------------------------------------------------------------------------------------------------

    def _rebuild_list(self) -> None:
        self._hide_card()
        self._list.clear()
        with self._list:
            if not self.exchanges:
                self._build_welcome()
            for exchange in self.exchanges:
                self._build_exchange(exchange)

    def _show_running(self) -> None:
        self._send.set_visibility(not self._answering)
        self._stop.set_visibility(self._answering)

    def _point(self, answer: Answer, where: dict[str, float] | None) -> None:
        """Show the card of the token under the pointer: below it, or above where there is no room below."""
        if where is None or not 0 <= where["i"] < len(answer.pieces):
            self._hide_card()
            return
        piece = answer.pieces[int(where["i"])]
        self._card_body.set_content(render_alternatives(piece, answer.tokenizer, self._say("probability_note")))
        below = where["bottom"] + 250 < where["height"]
        vertical = f"top:{where['bottom'] + 6:.0f}px" if below else f"bottom:{where['height'] - where['top'] + 6:.0f}px"
        self._card.style(replace=f"left:clamp(8px, {where['left'] - 24:.0f}px, calc(100vw - 276px));{vertical}")
        self._card.classes(add="shown")

    def _hide_card(self) -> None:
        self._card.classes(remove="shown")
