"""The chat page: one visitor's conversation with the engines of this process."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from nicegui import background_tasks, ui

from hanlin.core.errors import HanlinError
from hanlin.engine import Busy
from hanlin.serve.generation import Generation, Manner
from hanlin.serve.metrics import ModelMetrics
from hanlin.studio.answer import Answer, TooLongError, fit
from hanlin.studio.answer_view import AnswerView
from hanlin.studio.chat_model import ChatModel, with_adapters
from hanlin.studio.conversation import Conversation, Turn
from hanlin.studio.frame import IS_DARK, remember_language, remember_look
from hanlin.studio.pager import build_icon
from hanlin.studio.portable import Talk
from hanlin.studio.question_view import ENTER, QuestionView
from hanlin.studio.rendering import SHEET
from hanlin.studio.saving import build_entries, build_upload
from hanlin.studio.settings import Settings, build_settings
from hanlin.studio.token_card import TokenCard
from hanlin.studio.words import Language, choose, say

log = logging.getLogger("hanlin.studio")

REFRESH = 0.06  # seconds between two updates of a growing answer

# Keep the cursor in the input, but raise no keyboard on a phone.
FOCUS = "if (matchMedia('(hover: hover)').matches) document.querySelector('.hl-field textarea')?.focus()"


class ChatPage:
    """State and parts of the page of one visitor. Changing the language builds the parts anew from the state."""

    def __init__(
        self, models: Sequence[ChatModel], language: Language, *, metrics: Mapping[str, ModelMetrics] | None = None
    ) -> None:
        self.offers = {model.label: model for model in with_adapters(models)}
        self.models = [models[0]]  # of the columns: one, or two side by side
        self.language: Language = language
        self.settings = Settings(models[0].sampling)
        self.talk: Talk = Conversation()
        self._metrics = metrics or {}
        self._answering = self._stopping = False
        self._generations: list[Generation] = []
        self._views: dict[Answer, AnswerView] = {}

    def build(self, *, dark: bool | None) -> None:
        """Put the page into the current client."""
        self._dark = ui.dark_mode(dark)
        self._drawer = (
            ui.right_drawer(value=False).classes("hl-drawer").props("width=320 breakpoint=1180 show-if-above")
        )
        with self._drawer:
            self._drawer_body = ui.element("div").classes("hl-drawer-body")
        self._shell = ui.element("div").classes("hl-shell")
        self._card = TokenCard()
        build_upload(lambda: self.language, self._open)
        ui.context.client.on_delete(self.stop)
        self._fill()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        self._shell.clear()
        self._card.hide()
        copy, copied = (json.dumps(self._say(key), ensure_ascii=False) for key in ("copy", "copied"))
        self._shell.style(replace=f"--copy:{copy};--copied:{copied}")  # the words on the buttons of code blocks
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
                context=self.models[0].engine.max_context,
                system=self.talk.system,
                on_system=self._set_system,
                on_colour=self._set_coloured,
                on_reset=self._reset,
            )

    def _build_header(self) -> None:
        with ui.element("header").classes("hl-header"):
            ui.element("div").classes("hl-seal").props('aria-hidden="true"')
            ui.label(self._say("title")).classes("hl-title")
            with ui.element("div").classes("hl-models" + (" two" if len(self.models) > 1 else "")):
                if len(self.offers) == 1:
                    ui.label(self.models[0].label).classes("hl-model-name")
                else:
                    for column, key in enumerate(("model", "second_model")[: len(self.models)]):
                        self._build_choice(column, key)
            ui.element("div").classes("hl-space")
            self._icon_button("add_comment", "new", self._clear)
            if len(self.offers) > 1:
                compare = self._icon_button("vertical_split", "compare", self._compare)
                compare.classes("on" if len(self.models) > 1 else "")
            self._icon_button("translate", "language", self._switch_language)
            contrast = self._icon_button("contrast", "dark")
            contrast.on("click", lambda event: self._set_dark(not event.args), js_handler=IS_DARK)
            more = build_icon("more_vert", self._say("more"), None, small=False, tip=False)  # a tip would hide the menu
            with more.classes("hl-icon"), ui.menu():
                if self.models[0].card:
                    ui.menu_item(self._say("about"), self._show_about)
                build_entries(self.language, lambda: self.talk)
            self._icon_button("tune", "settings", self._drawer.toggle)

    def _build_choice(self, column: int, key: str) -> None:
        ui.select(
            list(self.offers),
            value=self.models[column].label,
            on_change=lambda event: self._choose_model(column, event.value),
        ).props(f'dense borderless options-dense aria-label="{self._say(key)}"').classes("hl-model")

    def _build_scroller(self) -> None:
        with ui.element("main").classes("hl-scroller").on("scroll", self._card.hide, args=[], throttle=0.1):
            self._list = ui.element("div").classes("hl-list")
            self._list.classes(add="coloured" if self.settings.coloured else "")
            self._list.classes(add="two" if len(self.models) > 1 else "")
        self._rebuild_list()

    def _build_welcome(self) -> None:
        with ui.element("div").classes("hl-welcome") as self._welcome:
            ui.element("div").classes("hl-seal large").props('aria-hidden="true"')
            ui.label(self._say("greeting")).classes("hl-greeting")
            card = choose(self.models[0].card, self.language)
            if card:
                with ui.element("section").classes("hl-about"):
                    ui.label(self._say("about")).classes("hl-heading")
                    ui.markdown(card)
            examples = choose(self.models[0].examples, self.language)
            if examples:
                ui.label(self._say("try")).classes("hl-heading center")
                with ui.element("div").classes("hl-chips"):
                    for text in examples:
                        ui.button(text, on_click=lambda _, text=text: self.send(text), color=None).props(
                            "flat no-caps"
                        ).classes("hl-chip")

    def _build_turn(self, depth: int, turn: Turn[Answer], variant: tuple[int, int]) -> None:
        QuestionView(
            turn.question,
            self.language,
            variant=variant,
            on_show=lambda index: self._show(self.talk.show_question(depth, index)),
            on_edit=lambda text: self._ask(text, depth),
        )
        columns = [column for column in range(len(self.models)) if turn.answer(column) is not None]
        with ui.element("div").classes("hl-answers"):
            for column in columns:
                self._build_answer(depth, turn, column)

    def _build_answer(self, depth: int, turn: Turn[Answer], column: int) -> None:
        answer, model = turn.answers[column][turn.shown[column]], self.models[column]
        self._views[answer] = AnswerView(
            answer,
            self.language,
            context=model.engine.max_context,
            title=answer.model if len(self.models) > 1 or answer.model != model.label else "",
            variant=(turn.shown[column], len(turn.answers[column])),
            on_point=self._point,
            on_again=lambda: self._again(depth, column),
            on_show=lambda index: self._show(self.talk.show_answer(depth, column, index)),
        )

    def _build_composer(self) -> None:
        with ui.element("footer").classes("hl-composer"):
            with ui.element("div").classes("hl-box"):
                self._input = (
                    ui.textarea(
                        placeholder=self._say("placeholder", name=" · ".join(model.label for model in self.models))
                    )
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
        return build_icon(icon, self._say(key), action, small=False).classes("hl-icon")

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
        await self._ask(question)

    async def _ask(self, question: str, depth: int | None = None) -> None:
        """A question at the end, or in place of an earlier one, to the model of each column."""
        if self._answering:
            return
        self.talk = self.talk.ask(question, depth)
        await self._answer(len(self.talk.path()) - 1, range(len(self.models)))

    async def _again(self, depth: int, column: int) -> None:
        if not self._answering:
            await self._answer(depth, [column])

    async def _answer(self, depth: int, columns: Sequence[int]) -> None:
        """Let the models write an answer each, all at once, and show them while they come."""
        answers: list[Answer] = []
        for column in columns:
            model = self.models[column]
            answers.append(Answer(model.label, model.engine.tokenizer))
            self.talk = self.talk.add_answer(depth, column, answers[-1])
        self._answering, self._stopping = True, False
        self._rebuild_list()
        self._show_running()
        try:
            heard = [self.talk.messages(column, depth) for column in columns]
            models = [self.models[column] for column in columns]
            await asyncio.gather(*(self._write(*each) for each in zip(answers, models, heard, strict=True)))
        finally:
            self._generations, self._answering = [], False
            self._show_running()

    async def _write(self, answer: Answer, model: ChatModel, messages: list[dict[str, str]]) -> None:
        try:
            fitted = await asyncio.to_thread(
                fit,
                messages,
                chat=model.engine.tokenizer.chat,
                context=model.engine.max_context,
                max_tokens=self.settings.sampling.max_tokens,
            )
            answer.forgot = fitted.forgot
            metrics = self._metrics.get(model.name)
            generation = Generation(
                model.engine,
                [fitted.ids],
                self.settings.params(max_tokens=fitted.max_tokens),
                watch=metrics.watch() if metrics else None,
                manner=Manner(adapter=model.adapter),
            )
            self._generations.append(generation)
            if self._stopping:  # asked for while the prompt was being prepared
                generation.abort()
            await self._follow(answer, generation)
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
            self._refresh(answer)

    async def _follow(self, answer: Answer, generation: Generation) -> None:
        next_time = 0.0
        async with contextlib.aclosing(generation.events()) as coming:
            async for _, event in coming:
                answer.add(event)
                if time.monotonic() >= next_time:
                    size = self._refresh(answer)
                    next_time = time.monotonic() + REFRESH * max(1.0, size / SHEET)

    def _refresh(self, answer: Answer) -> int:
        """Show an answer as it is now, if it is on the page; how many characters that sent."""
        view = self._views.get(answer)
        if view is None:
            return 0
        view.refresh()
        return view.open_characters

    def stop(self) -> None:
        """End the answers that are under way; what there is of them stays."""
        self._stopping = True
        for generation in self._generations:
            generation.abort()

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
        self._show(Conversation(self.talk.system))

    def _show(self, talk: Talk) -> None:
        """Another conversation, or another path through this one."""
        self.stop()
        self.talk = talk
        self._rebuild_list()

    def _set_system(self, system: str) -> None:
        self.talk = replace(self.talk, system=system)

    def _choose_model(self, column: int, name: str) -> None:
        self.stop()
        self.models[column] = self.offers[name]
        if column == 0:
            self.settings.sampling = self.models[0].sampling
        self._fill()

    def _compare(self) -> None:
        """A second column, or one again."""
        self.stop()
        others = [model for model in self.offers.values() if model is not self.models[0]]
        self.models = [self.models[0], *others[:1]] if len(self.models) == 1 else self.models[:1]
        self._fill()

    def _open(self, talk: Talk) -> None:
        self._show(talk)
        self._fill_drawer()  # the system prompt

    def _reset(self) -> None:
        self.settings.sampling = self.models[0].sampling
        self._fill_drawer()

    def _set_coloured(self, coloured: bool) -> None:
        self.settings.coloured = coloured
        self._list.classes(add="coloured" if coloured else "", remove="" if coloured else "coloured")

    def _switch_language(self) -> None:
        self.language = "zh" if self.language == "en" else "en"
        remember_language(self.language)
        self._fill()

    def _set_dark(self, dark: bool) -> None:
        self._dark.value = dark
        remember_look(dark)

    def _show_about(self) -> None:
        with self._shell, ui.dialog(value=True) as dialog, ui.element("section").classes("hl-about dialog"):
            ui.label(self._say("about")).classes("hl-heading")
            ui.markdown(choose(self.models[0].card, self.language))
        dialog.on("hide", dialog.delete)

    # -- showing -------------------------------------------------------------------------------------------------------

    def _rebuild_list(self) -> None:
        self._card.hide()
        self._views = {}
        self._list.clear()
        with self._list:
            forks = self.talk.forks()[:-1]
            if not forks:
                self._build_welcome()
            for depth, fork in enumerate(forks):
                self._build_turn(depth, fork.turn, (fork.shown, len(fork.turns)))

    def _show_running(self) -> None:
        self._send.set_visibility(not self._answering)
        self._stop.set_visibility(self._answering)
        self._list.classes(add="busy" if self._answering else "", remove="" if self._answering else "busy")

    def _point(self, answer: Answer, where: dict[str, float] | None) -> None:
        self._card.show(answer, where, self._say("probability_note"))
