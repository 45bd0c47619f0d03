"""The drawer: the system prompt of the conversation, sampling controls with an explanation each, colours."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from nicegui import ui

from hanlin.engine import SamplingParams
from hanlin.studio.words import Language, say

ALTERNATIVES = 5  # shown beside a token


@dataclass
class Settings:
    """What the visitor chose."""

    sampling: SamplingParams
    coloured: bool = False

    def change(self, **values: object) -> None:
        self.sampling = dataclasses.replace(self.sampling, **values)  # type: ignore[arg-type]

    def params(self, *, max_tokens: int) -> SamplingParams:
        """For one answer, with the alternatives that the page shows."""
        return dataclasses.replace(self.sampling, max_tokens=max_tokens, logprobs=ALTERNATIVES, n=1)


# name, least, most, step, how the value is written
SLIDERS = (
    ("temperature", 0.0, 2.0, 0.05, "{:.2f}"),
    ("top_p", 0.05, 1.0, 0.05, "{:.2f}"),
    ("top_k", 0, 200, 1, "{:.0f}"),
    ("min_p", 0.0, 0.5, 0.01, "{:.2f}"),
    ("repetition_penalty", 1.0, 2.0, 0.05, "{:.2f}"),
)


def build_settings(
    settings: Settings,
    language: Language,
    *,
    context: int,
    system: str,
    on_system: Callable[[str], object],
    on_colour: Callable[[bool], object],
    on_reset: Callable[[], object],
) -> None:
    """Fill the current container."""
    with ui.element("section").classes("hl-group"):
        _heading("system", language, hint="system_hint")
        ui.textarea(
            value=system,
            placeholder=say("system_placeholder", language),
            on_change=lambda event: on_system((event.value or "").strip()),
        ).props("outlined dense autogrow").classes("hl-system")
    with ui.element("section").classes("hl-group"):
        with ui.element("div").classes("hl-heading-row"):
            ui.label(say("sampling", language)).classes("hl-heading")
            ui.button(say("reset", language), on_click=on_reset, color=None).props(
                "flat dense no-caps size=sm"
            ).classes("hl-reset")
        for name, least, most, step, form in SLIDERS:
            _slider(settings, language, name, least, most, step, form)
        _slider(settings, language, "max_tokens", 1, min(context, 4096), 1, "{:.0f}")
        with ui.element("div").classes("hl-control hl-control-line"):
            _label("seed", language)
            ui.number(
                value=settings.sampling.seed,
                placeholder=say("seed_placeholder", language),
                min=0,
                max=2**53,
                precision=0,
                on_change=lambda event: settings.change(seed=None if event.value is None else int(event.value)),
            ).props(f'outlined dense hide-bottom-space aria-label="{say("seed", language)}"').classes("hl-seed")
    with ui.element("section").classes("hl-group"):
        with ui.element("div").classes("hl-control hl-control-line"):
            _label("colour", language)
            ui.switch(value=settings.coloured, on_change=lambda event: on_colour(event.value)).props(
                f'dense aria-label="{say("colour", language)}"'
            )
        with ui.element("div").classes("hl-legend"):
            ui.label(say("unlikely", language))
            for step in range(7, -1, -1):
                ui.element("span").classes(f"swatch s{step}")
            ui.label(say("certain", language))


def _heading(key: str, language: Language, *, hint: str) -> None:
    with ui.element("div").classes("hl-heading-row"):
        ui.label(say(key, language)).classes("hl-heading")
        _hint(say(hint, language))


def _label(key: str, language: Language) -> None:
    with ui.element("div").classes("hl-label"):
        ui.label(say(key, language))
        _hint(say(f"{key}_hint", language))


def _hint(text: str) -> None:
    with ui.icon("help_outline").classes("hl-hint").props(f'role="img" tabindex="0" aria-label="{text}"'):
        ui.tooltip(text).classes("hl-tooltip").props('anchor="bottom middle" self="top middle" max-width="240px"')


def _slider(
    settings: Settings, language: Language, name: str, least: float, most: float, step: float, form: str
) -> None:
    value = min(max(getattr(settings.sampling, name), least), most)
    whole = isinstance(step, int)

    def change(new: float) -> None:
        settings.change(**{name: int(new) if whole else float(new)})
        shown.set_text(form.format(new))

    with ui.element("div").classes("hl-control"):
        with ui.element("div").classes("hl-control-line"):
            _label(name, language)
            shown = ui.label(form.format(value)).classes("hl-value")
        ui.slider(min=least, max=most, step=step, value=value, on_change=lambda event: change(event.value)).props(
            f'aria-label="{say(name, language)}"'
        )
