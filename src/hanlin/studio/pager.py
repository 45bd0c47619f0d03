"""◀ 2/3 ▶: which of several variants stands here. And the small round buttons of the page."""

from collections.abc import Callable

from nicegui import ui

from hanlin.studio.words import Language, say


def build_icon(
    icon: str, label: str, action: Callable[[], object] | None, *, small: bool = True, tip: bool = True
) -> ui.button:
    """A button with a sign, its meaning as tooltip and for screen readers."""
    button = ui.button(icon=icon, on_click=action, color=None)
    if tip:
        button.tooltip(label)
    return button.props(f'flat round dense{" size=sm" if small else ""} aria-label="{label}"')


def build_pager(index: int, count: int, language: Language, on_show: Callable[[int], object]) -> None:
    """Nothing where there is only one."""
    if count < 2:
        return
    with ui.element("div").classes("hl-pager"):
        before = build_icon("chevron_left", say("previous", language), lambda: on_show(index - 1))
        ui.label(f"{index + 1}/{count}").classes("hl-page")
        after = build_icon("chevron_right", say("next", language), lambda: on_show(index + 1))
    before.set_enabled(index > 0)
    after.set_enabled(index < count - 1)
