"""`health.png` and `report.md` of an alignment run: small panels of what it is judged by, its alarms, its answers.

Made from `metrics.jsonl` and `samples.jsonl` alone, so of a run that still goes on, that was killed, or a copy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hanlin.align.health import Alarm, Health, read_samples
from hanlin.align.health_panels import PANELS, Curve, Panel, short_name
from hanlin.core.figures import save_figure
from hanlin.core.files import write_text
from hanlin.core.runs import Run
from hanlin.train.history import RunHistory, read_run

FIGURE, REPORT, SAMPLES = "health.png", "report.md", "samples.jsonl"
COLOURS = ("#2f6fb2", "#d9822b", "#4a9c6d", "#8a5aab", "#8c959f", "#b5a642")
INK, RED = "#24292f", "#b3382c"
WIDE = 3  # panels beside one another
SHOWN = 8  # samples at either end
HEADLINES = (
    "reward", "eval/sampled", "eval/greedy", "groups/silent", "entropy", "kl/answer", "kl/k1", "answer/length",
    "answer/truncated", "rollout/mismatch_p95", "explained_variance", "eval_text/loss", "rewards/accuracy",
    "rewards/chosen", "rewards/rejected", "eval/loss", "tokens_per_s",
)  # fmt: skip


def write_health(run: Run) -> None:
    """Both files into the run folder. The `finish` of a run's wiring: `partial(write_health, parts.run)`."""
    history = read_run(run.path)
    alarms = Health.over(history.rows).alarms
    draw_health(history, alarms, run.path / FIGURE)
    samples = read_samples(run.path / SAMPLES)
    write_text(run.path / REPORT, health_report(history, alarms, samples))


# --- the figure ---


def draw_health(history: RunHistory, alarms: Sequence[Alarm], out: Path) -> None:
    """One page of the panels that the run has numbers for; alarms are red lines at their steps."""
    from matplotlib.figure import Figure

    drawn = [(panel, curves) for panel in PANELS if (curves := panel.curves(history))]
    tall = max(1, -(-len(drawn) // WIDE))
    wide, high = 4.7 * WIDE, 2.5 * tall + 0.4
    figure = Figure(figsize=(wide, high), facecolor="white")
    figure.subplots_adjust(  # in inches: an automatic layout costs seconds
        left=0.55 / wide, right=1 - 0.15 / wide, bottom=0.3 / high, top=1 - 0.7 / high, wspace=0.16, hspace=0.3
    )
    said = f"{len(alarms)} alarm{'s' if len(alarms) != 1 else ''}" if alarms else "no alarm"
    figure.suptitle(
        f"{history.name}: {said}",
        color=RED if alarms else INK,
        fontsize=12,
        x=0.01,
        y=1 - 0.15 / high,
        ha="left",
        va="top",
    )
    for place, (panel, curves) in enumerate(drawn, start=1):
        axes = figure.add_subplot(tall, WIDE, place)
        draw_panel(axes, panel, curves, panel.alarms(alarms))
    save_figure(figure, out, dpi=110)


def draw_panel(axes: Any, panel: Panel, curves: dict[str, Curve], alarms: Sequence[Alarm]) -> None:
    """Each metric a line, or an area on top of the one before."""
    values = [value for curve in curves.values() for _, value in curve]
    if panel.how == "stack":
        steps = [step for step, _ in next(iter(curves.values()))]
        heights = [[value for _, value in curve] for curve in curves.values()]
        values += [sum(column) for column in zip(*heights, strict=True)]
        axes.stackplot(steps, *heights, labels=[short_name(name) for name in curves], colors=COLOURS * 3, alpha=0.85)
    else:
        for (name, curve), colour in zip(curves.items(), COLOURS * 3, strict=False):
            style = "o-" if len(curve) < 30 else "-"
            axes.plot(
                *zip(*curve, strict=True), style, label=short_name(name), color=colour, linewidth=1.2, markersize=2.5
            )
    if panel.logarithmic and min(values) > 0:
        axes.set_yscale("log")
    else:
        low = min(values) if panel.low is None else min(*values, panel.low)
        high = max(values) if panel.high is None else max(*values, panel.high)
        room = 0.04 * ((high - low) or abs(high) or 1.0)
        axes.set_ylim(low - (room if low != panel.low else 0.0), high + room)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if panel.limit is not None:
        axes.axhline(panel.limit, color=RED, linewidth=0.7, linestyle=":")
    for alarm in alarms:
        axes.axvline(alarm.step, color=RED, linewidth=1.1, alpha=0.8)
        axes.text(alarm.step, 0.98, f" {alarm.rule.name}", color=RED, fontsize=7, rotation=90, va="top", ha="right",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    silent = bool(panel.zero) and not any(values)
    if silent:
        axes.text(0.5, 0.5, panel.zero, ha="center", va="center", color=INK, fontsize=9, transform=axes.transAxes)
    axes.set_title(panel.title, fontsize=9.5, loc="left", color=RED if alarms else INK)
    if len(curves) > 1 and not silent:
        axes.legend(
            fontsize=7, frameon=False, labelcolor=INK, loc="lower right", bbox_to_anchor=(1.02, 0.97),
            ncols=len(curves), handlelength=1.0, handletextpad=0.4, columnspacing=0.9, borderpad=0.1,
        )  # fmt: skip
    axes.grid(color="#e6e9ec", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=7.5, colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


# --- the report ---


def health_report(history: RunHistory, alarms: Sequence[Alarm], samples: Sequence[dict[str, Any]]) -> str:
    """Markdown: alarms in bold, the first and the last value of what matters, answers of the first rounds and the last
    side by side."""
    state = history.summary()
    kind = state["kind"] or "alignment"
    parts = [f"# {history.name}: {kind}, step {state['step']}" + (f" of {state['steps']}" if state["steps"] else "")]
    if alarms:
        parts.append("\n".join(f"- **Step {alarm.step:g}: {_bare(alarm.text)}**" for alarm in alarms))
    else:
        parts.append("No alarm.")
    if history.curve("clip_high") and not any(v for name in ("clip_low", "clip_high") for _, v in history.curve(name)):
        parts.append(
            "Clipped: none. The run is on-policy: each answer is learnt from once, by the weights that wrote it."
        )
    parts.append(_headlines(history))
    parts.append(f"![Health]({FIGURE})")
    if samples:
        parts.append(_samples(samples))
    return "\n\n".join(part for part in parts if part) + "\n"


def _headlines(history: RunHistory) -> str:
    rows = [
        f"| {name} | {curve[0][1]:.4g} | {curve[-1][1]:.4g} |" for name in HEADLINES if (curve := history.curve(name))
    ]
    return "\n".join(["| | first | last |", "| --- | ---: | ---: |", *rows]) if rows else ""


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    """Two answers a row: of the first rounds, and of the last."""
    half = min(SHOWN, -(-len(samples) // 2))
    first, last = samples[:half], samples[max(half, len(samples) - half) :]
    lines = [
        "## Answers",
        "",
        "| round | prompt | answer | score | round | prompt | answer | score |",
        "| ---: | --- | --- | ---: | ---: | --- | --- | ---: |",
    ]
    for place in range(len(first)):
        cells = _cells(first[place]) + (_cells(last[place]) if place < len(last) else [""] * 4)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(sample: dict[str, Any]) -> list[str]:
    score = sample.get("score")
    cut = " …(cut)" if sample.get("finish") == "length" else ""
    shown = f"{score:.3g}" if isinstance(score, int | float) else ""
    return [str(sample["round"]), _cell(sample.get("prompt", "")), _cell(sample.get("answer", "")) + cut, shown]


def _cell(text: object, longest: int = 160) -> str:
    """Text as it is, in a cell: no line ends, nothing that Markdown or HTML would read."""
    line = " ".join(str(text).split())
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    return _bare(line).replace("|", "\\|")


def _bare(text: str) -> str:
    for sign in "\\`*_<[#~":
        text = text.replace(sign, "\\" + sign)
    return text
