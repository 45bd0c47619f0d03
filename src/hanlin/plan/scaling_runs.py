"""Run folders as points of a scaling law, and its plot.

Of each finished run one point: the parameters of its model, the tokens that it read, its loss at the end (on held-out
text where every run has it, else the mean of the last tenth of its training lines). Losses in the middle of a run are
no points: its learning rate has not come down yet (arXiv:2203.15556, appendix B).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hanlin.align.recipe import TrainRecipe
from hanlin.core.errors import HanlinError
from hanlin.core.figures import save_figure
from hanlin.core.runs import Run
from hanlin.models import ModelConfig, load_config
from hanlin.plan.request import recipe_config
from hanlin.plan.scaling import Budget, Fit, Point
from hanlin.plan.table import quantity
from hanlin.train.history import RunHistory, read_run

HELD_OUT = "eval/loss"
TAIL = 0.1  # of the tokens, whose training losses are averaged
BLUE, ORANGE, INK, GREY = "#2f6fb2", "#d9822b", "#24292f", "#8c959f"


def read_points(folders: Sequence[Path], *, vocab_size: int | None = None) -> tuple[list[Point], str]:
    """(points, what their loss is: `eval/loss` or `loss`). A folder that is no run, or a run without an end, is a
    `HanlinError` that names it."""
    histories = [read_run(folder) for folder in folders]
    held_out = all(history.last(HELD_OUT) is not None for history in histories)
    points = []
    for history in histories:
        _refuse_unfinished(history)
        tokens = history.last("tokens")
        loss = history.last(HELD_OUT) if held_out else _tail(history)
        if tokens is None or loss is None:
            raise HanlinError(f"{history.path} has no loss in its metrics.jsonl yet; leave it out.")
        parameters = run_config(history.path, vocab_size).parameters().total
        points.append(Point(history.name, float(parameters), tokens, loss))
    return points, HELD_OUT if held_out else "loss"


def run_config(folder: Path, vocab_size: int | None = None) -> ModelConfig:
    """The model of a run: its model folder, or what its recipe says."""
    run = Run(folder)
    if (run.model / "config.json").exists():
        return load_config(run.model)
    if not run.recipe.exists():
        raise HanlinError(
            f"{folder} has neither model/config.json nor recipe.yaml, so the size of its model is unknown."
        )
    return recipe_config(TrainRecipe.load(run.recipe), vocab_size)


def draw_law(points: Sequence[Point], fit: Fit, budgets: Sequence[Budget], path: Path, *, loss: str) -> None:
    """Two panels: loss over tokens for each size with the fitted curves, and the best size for a budget."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(12, 4.8), dpi=120, facecolor="white")
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    left, right = figure.subplots(1, 2)
    sizes = sorted({p.parameters for p in points})
    span = np.geomspace(min(p.tokens for p in points), max(p.tokens for p in points), 100)
    for number, size in enumerate(sizes):
        colour = _between(number / max(1, len(sizes) - 1))
        mine = sorted((p.tokens, p.loss) for p in points if p.parameters == size)
        left.plot(*zip(*mine, strict=True), "o", color=colour, markersize=5)
        left.plot(span, [fit.law.loss(size, d) for d in span], color=colour, linewidth=1.3, label=quantity(size))
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel("tokens", fontsize=9, color=INK)
    left.set_ylabel(f"{loss}, nats a token", fontsize=9, color=INK)
    left.legend(title="parameters", fontsize=8, title_fontsize=8, frameon=False)
    flops = [p.flops for p in points]
    reach = np.geomspace(min(flops), max(flops) * 100, 60)
    right.plot(reach, [fit.law.optimum(c)[0] for c in reach], color=BLUE, linewidth=1.6, label="fitted law")
    right.plot(reach, np.sqrt(reach / 120), "--", color=GREY, linewidth=1.2, label="D = 20 N")
    right.plot(flops, [p.parameters for p in points], "o", color=GREY, markersize=4, label="runs")
    if budgets:
        right.plot(
            [b.flops for b in budgets], [b.parameters for b in budgets], "D", color=ORANGE, label="isoFLOP minima"
        )
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("C = 6 N D, FLOPs", fontsize=9, color=INK)
    right.set_ylabel("best size, parameters", fontsize=9, color=INK)
    right.legend(fontsize=8, frameon=False)
    law = fit.law
    left.set_title(
        f"L = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}",
        fontsize=10, color=INK, loc="left",
    )  # fmt: skip
    for axes in (left, right):
        _dress(axes)
    save_figure(figure, path)


def _refuse_unfinished(history: RunHistory) -> None:
    """A run without its model is finished only if its last step is the last that the recipe plans."""
    if history.finished:
        return
    step, steps = int(history.last("step") or 0), history.steps
    if steps is None:
        raise HanlinError(
            f"{history.path} has no model folder, and its recipe names no steps, so whether it is finished is unknown; "
            "leave it out."
        )
    if step < steps:
        raise HanlinError(
            f"{history.path} is not finished: step {step} of {steps}, no model folder. Its learning rate has not come "
            "down yet, so its loss is no point of a law; let it finish, or leave it out."
        )


def _tail(history: RunHistory) -> float | None:
    curve = history.curve("loss", by="tokens")
    if not curve:
        return None
    last = [value for at, value in curve if at >= (1 - TAIL) * curve[-1][0]]
    return sum(last) / len(last)


def _between(share: float) -> tuple[float, float, float]:
    """From light to dark blue."""
    (r, g, b), (r_dark, g_dark, b_dark) = (0.62, 0.79, 0.93), (0.10, 0.25, 0.45)
    return r + share * (r_dark - r), g + share * (g_dark - g), b + share * (b_dark - b)


def _dress(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
