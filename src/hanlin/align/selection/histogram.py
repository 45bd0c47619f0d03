"""`selection.png`: how the scores of kept and dropped examples are spread, and where they part."""

from pathlib import Path

from hanlin.align.selection.decisions import Selection
from hanlin.core.figures import save_figure

INK, KEPT, DROPPED = "#24292f", "#2f6fb2", "#c8ced4"


def draw_scores(selection: Selection, title: str, path: Path) -> None:
    """Stacked bars over the score; a line at the threshold where there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [[d.score for d in selection.decisions if d.kept is k and d.score is not None] for k in (True, False)]
    figure = Figure(figsize=(6.4, 3.6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"kept ({len(parts[0]):,})", f"dropped ({len(parts[1]):,})"]
    axes.hist(
        parts, bins=min(40, max(5, len(selection.decisions) // 4)), stacked=True, color=[KEPT, DROPPED], label=names
    )
    if selection.threshold is not None:
        axes.axvline(selection.threshold, color=INK, linewidth=1.2, linestyle="--", label=f"{selection.threshold:.4g}")
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_xlabel("score", fontsize=9, color=INK)
    axes.set_ylabel("examples", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    save_figure(figure, path)
