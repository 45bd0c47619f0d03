"""The health page: how the runs of a folder go, refreshed from their files while they are written.

alarms in words -> small panels (`align.health_panels`) -> the newest answers with their scores
"""

import asyncio
from pathlib import Path
from typing import Any

from nicegui import ui

from hanlin.align.health_conditions import thin_curve
from hanlin.align.health_panels import PANELS, Curve, Panel, short_name
from hanlin.core.errors import HanlinError
from hanlin.studio.followed_run import FollowedRun, run_folders
from hanlin.studio.frame import IS_DARK, remember_language, remember_look
from hanlin.studio.health_words import alarm_text, panel_title, panel_zero
from hanlin.studio.pager import build_icon
from hanlin.studio.words import Language, say

EVERY = 2.0  # seconds between two looks at the files
LISTED = 10  # looks between two searches for new runs
POINTS = 300  # of a line
SHOWN = 12  # answers
COLOURS = ("#2f6fb2", "#d9822b", "#4a9c6d", "#8a5aab", "#8c959f", "#b5a642")
RED, GREY, FAINT = "#b3382c", "#8a8176", "rgba(128,120,110,0.18)"


class HealthPage:
    """State and parts of the page of one visitor. root: the folder whose runs are shown."""

    def __init__(self, root: Path, language: Language) -> None:
        self.root, self.language = root, language
        self._runs = run_folders(root)
        self._name = next(iter(self._runs), None)
        self._run: FollowedRun | None = None
        self._looks, self._busy = 0, False
        self._charts: dict[str, ui.echart] = {}

    def build(self, *, dark: bool | None) -> None:
        """Put the page into the current client."""
        self._dark = ui.dark_mode(dark)
        self._shell = ui.element("div").classes("hl-shell hl-health")
        self._open()
        self._fill()
        ui.timer(EVERY, self._refresh)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        self._shell.clear()
        with self._shell:
            with ui.element("header").classes("hl-header"):
                ui.element("div").classes("hl-seal").props('aria-hidden="true"')
                ui.label(say("title", self.language)).classes("hl-title")
                self._choice = (
                    ui.select(list(self._runs), value=self._name, on_change=lambda event: self._choose(event.value))
                    .props(f'dense borderless options-dense aria-label="{say("run", self.language)}"')
                    .classes("hl-model")
                )
                self._state = ui.label().classes("hl-run-state").props('role="status"')
                ui.element("div").classes("hl-space")
                build_icon("translate", say("language", self.language), self._switch_language, small=False).classes(
                    "hl-icon"
                )
                contrast = build_icon("contrast", say("dark", self.language), None, small=False).classes("hl-icon")
                contrast.on("click", lambda event: self._set_dark(not event.args), js_handler=IS_DARK)
            with ui.element("main").classes("hl-health-body"):
                self._alarms = ui.element("section").classes("hl-alarms").props('role="log"')
                self._grid = ui.element("section").classes("hl-panels")
                self._answers = ui.element("section").classes("hl-answers-table")
        self._charts = {}
        self._show()

    def _show(self) -> None:
        """Everything as the run's files have it now."""
        run = self._run
        if run is None:
            self._state.text = say("no_run", self.language, folder=self.root)
            return
        found = run.history.summary()
        steps = f"{found['step']}" + (f" / {found['steps']}" if found["steps"] else "")
        self._state.text = f"{say('step', self.language, steps=steps)} · {say('run_' + run.state, self.language)}"
        self._show_alarms(run)
        self._show_panels(run)
        self._show_answers(run)

    def _show_alarms(self, run: FollowedRun) -> None:
        self._alarms.clear()
        with self._alarms:
            if not run.alarms:
                ui.label(say("no_alarm", self.language)).classes("hl-calm")
            for alarm in reversed(run.alarms):
                with ui.element("div").classes("hl-alarm"):
                    ui.label(say("step", self.language, steps=f"{alarm.step:g}")).classes("hl-alarm-step")
                    ui.label(alarm_text(alarm, self.language))

    def _show_panels(self, run: FollowedRun) -> None:
        """Each panel that has numbers: a chart that stays and gets new ones."""
        for panel in PANELS:
            curves = panel.curves(run.history)
            if not curves:
                continue
            steps = [alarm.step for alarm in panel.alarms(run.alarms)]
            options = chart_options(panel, curves, steps, self.language)
            if panel.title in self._charts:
                chart = self._charts[panel.title]
                chart.options.clear()
                chart.options.update(options)
                chart.update()
                continue
            with self._grid, ui.element("figure").classes("hl-panel"):
                title = panel_title(panel, self.language)
                ui.label(title).classes("hl-panel-title")
                self._charts[panel.title] = ui.echart(options).props(f'aria-label="{title}" role="img"')

    def _show_answers(self, run: FollowedRun) -> None:
        self._answers.clear()
        if not run.samples:
            return
        with self._answers:
            ui.label(say("newest_answers", self.language)).classes("hl-panel-title")
            with ui.element("table"):
                with ui.element("tr"):
                    for key in ("round", "question", "answer", "score", "length"):
                        with ui.element("th"):
                            ui.label(say(key, self.language))
                for sample in run.samples[: -SHOWN - 1 : -1]:
                    with ui.element("tr"):
                        for text in sample_cells(sample, self.language):
                            with ui.element("td"):
                                ui.label(text)

    # -- what happens --------------------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            self._looks += 1
            if self._run is None or self._looks % LISTED == 0:
                self._relist(await asyncio.to_thread(run_folders, self.root))
            run = self._run
            if run is not None and await asyncio.to_thread(_looked_at, run) and run is self._run:
                self._show()
        finally:
            self._busy = False

    def _relist(self, runs: dict[str, Path]) -> None:
        if list(runs) == list(self._runs) and self._run is not None:
            return
        self._runs = runs
        if self._name not in runs:
            self._name = next(iter(runs), None)
            self._open()
            self._fill()
        else:
            self._choice.set_options(list(runs), value=self._name)

    def _choose(self, name: str) -> None:
        if name != self._name and name in self._runs:
            self._name = name
            self._open()
            self._fill()

    def _open(self) -> None:
        self._run = FollowedRun(self._runs[self._name]) if self._name is not None else None

    def _switch_language(self) -> None:
        self.language = "zh" if self.language == "en" else "en"
        remember_language(self.language)
        self._fill()

    def _set_dark(self, dark: bool) -> None:
        self._dark.value = dark
        remember_look(dark)


def _looked_at(run: FollowedRun) -> bool:
    """Whether there is something new; a folder that is gone has nothing."""
    try:
        return run.read()
    except (HanlinError, OSError):
        return False


def sample_cells(sample: dict[str, Any], language: Language) -> list[str]:
    """Round, question, answer, score, tokens."""
    score = sample.get("score")
    cut = f" {say('cut', language)}" if sample.get("finish") == "length" else ""
    shown = f"{score:.3g}" if isinstance(score, int | float) else ""
    return [
        str(sample["round"]),
        str(sample.get("prompt", "")),
        str(sample.get("answer", "")) + cut,
        shown,
        str(sample.get("tokens", "")),
    ]


def chart_options(panel: Panel, curves: dict[str, Curve], alarms: list[float], language: Language) -> dict[str, Any]:
    """What ECharts draws: lines or areas, alarms as red lines, the limit as a dotted one."""
    values = [value for curve in curves.values() for _, value in curve]
    logarithmic = panel.logarithmic and min(values) > 0
    silent = bool(panel.zero) and not any(values)
    series: list[dict[str, Any]] = []
    for place, (name, curve) in enumerate(curves.items()):
        line: dict[str, Any] = {
            "type": "line", "name": short_name(name), "showSymbol": len(curve) < 30, "symbolSize": 4,
            "lineStyle": {"width": 1.4}, "itemStyle": {"color": COLOURS[place % len(COLOURS)]},
            "data": [[step, value] for step, value in thin_curve(curve, POINTS)],
        }  # fmt: skip
        if panel.how == "stack":
            line |= {"stack": "all", "areaStyle": {"opacity": 0.75}, "lineStyle": {"width": 0}}
        series.append(line)
    marks: list[dict[str, Any]] = [{"xAxis": step, "lineStyle": {"color": RED, "type": "solid"}} for step in alarms]
    if panel.limit is not None:
        marks.append({"yAxis": panel.limit, "lineStyle": {"color": RED, "type": "dotted"}})
    if marks:
        series[0]["markLine"] = {"symbol": "none", "silent": True, "label": {"show": False}, "data": marks}
    axis: dict[str, Any] = {
        "axisLabel": {"color": GREY, "fontSize": 10}, "splitLine": {"lineStyle": {"color": FAINT}},
        "axisLine": {"show": False}, "axisTick": {"show": False},
    }  # fmt: skip
    y: dict[str, Any] = {**axis, "type": "log" if logarithmic else "value", "scale": True}
    if panel.low is not None and not logarithmic and min(values) >= panel.low:
        y["min"] = panel.low
    if panel.high is not None and max(values) <= panel.high:
        y["max"] = panel.high
    return {
        "animation": False,
        "grid": {"left": 6, "right": 12, "top": 26, "bottom": 4, "containLabel": True},
        "legend": {"show": len(curves) > 1 and not silent, "top": 0, "right": 4, "itemWidth": 10, "itemHeight": 8,
                   "icon": "roundRect", "textStyle": {"color": GREY, "fontSize": 10}},
        "title": {"show": silent, "text": panel_zero(panel, language), "left": "center", "top": "middle",
                  "textStyle": {"color": GREY, "fontSize": 12, "fontWeight": "normal"}},
        "tooltip": {"trigger": "axis", "confine": True, "textStyle": {"fontSize": 11}},
        "xAxis": {**axis, "type": "value", "min": "dataMin", "max": "dataMax", "splitLine": {"show": False}},
        "yAxis": y,
        "series": series,
    }  # fmt: skip
