"""`report.png`: four panels that tell whether the model has learnt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hanlin.core.files import atomic_path

INK, GREY = "#24292f", "#8c959f"
BLUE, ORANGE, GREEN = "#2f6fb2", "#d9822b", "#4a9c6d"


def draw_report(evaluation: Mapping[str, Any], pretrain: Sequence[dict], sft: Sequence[dict], path: Path) -> None:
    """evaluation: the result of the evaluation stage; pretrain, sft: rows of their `metrics.jsonl`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), dpi=110, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, wspace=0.06, hspace=0.06)
    FigureCanvasAgg(figure)  # no window, no global state
    panels = figure.subplots(2, 2)
    draw_loss(panels[0][0], pretrain, "Pretraining: loss on the text", BLUE)
    draw_loss(panels[0][1], sft, "Instruction tuning: loss on the answers", ORANGE)
    draw_bits(panels[1][0], evaluation)
    draw_answers(panels[1][1], evaluation)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_loss(axes: Any, rows: Sequence[dict], title: str, colour: str) -> None:
    """Training loss by tokens, and held-out loss where it was measured on the way."""
    points = [(row.get("tokens", 0), row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["tokens"], row["eval/loss"]) for row in rows if row.get("eval/loss") is not None]
    if points:
        tokens, losses = zip(*points, strict=True)
        axes.plot([t / 1e6 for t in tokens], losses, color=colour, linewidth=1.3, label="training")
    if held_out:
        tokens, losses = zip(*held_out, strict=True)
        axes.plot([t / 1e6 for t in tokens], losses, "o-", color=INK, markersize=3, linewidth=1, label="held out")
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlabel("million tokens read", fontsize=9, color=INK)
    axes.set_ylabel("nats a token", fontsize=9, color=INK)
    axes.set_ylim(bottom=0)
    _dress(axes, title, grid="y")


def draw_bits(axes: Any, evaluation: Mapping[str, Any]) -> None:
    """Bits per byte on held-out text; shorter is better."""
    stages, others = evaluation["perplexity"], evaluation["baselines"]
    bars = [
        ("before training", stages["start"]["bits_per_byte"], GREY),
        ("after pretraining", stages["pretrain"]["bits_per_byte"], BLUE),
        ("after instruction tuning", stages["sft"]["bits_per_byte"], ORANGE),
        ("byte 6-gram model", others["6-gram"], "#c8ced4"),
        ("xz", others["xz"], "#c8ced4"),
    ]
    names, values, colours = zip(*reversed(bars), strict=True)
    drawn = axes.barh(names, values, color=colours, height=0.62)
    axes.bar_label(drawn, fmt="%.2f", padding=4, fontsize=9, color=INK)
    axes.set_xlim(0, max(values) * 1.14)
    _dress(axes, "Bits per byte on held-out text (shorter is better)", grid="x")


def draw_answers(axes: Any, evaluation: Mapping[str, Any]) -> None:
    """Share of exact answers by group and language after instruction tuning."""
    grades = evaluation["exam"]["sft"]
    groups = list(grades)
    for offset, language, colour, name in ((0.2, "en", BLUE, "English"), (-0.2, "zh", GREEN, "Chinese")):
        shares = [100 * _share(grades[group].get(language)) for group in groups]
        places = [len(groups) - 1 - i + offset for i in range(len(groups))]
        drawn = axes.barh(places, shares, height=0.36, color=colour, label=name)
        axes.bar_label(drawn, fmt="%.0f %%", padding=3, fontsize=8, color=INK)
    axes.set_yticks(range(len(groups) - 1, -1, -1), [group.replace(", ", ",\n") for group in groups])
    axes.set_xlim(0, 118)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, labelcolor=INK)
    _dress(axes, "Exact answers after instruction tuning", grid="x")


def _share(pair: Sequence[int] | None) -> float:
    return pair[0] / pair[1] if pair and pair[1] else 0.0


def _dress(axes: Any, title: str, *, grid: str) -> None:
    axes.set_title(title, fontsize=11, color=INK, loc="left", pad=10)
    axes.grid(axis=grid, color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
