"""What was learnt, as pictures: the learning curve, and the values and greedy actions of a grid world."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hanlin.core.figures import save_figure

INK, GREY, BLUE, ORANGE = "#1f2933", "#9aa5b1", "#2f6fb0", "#d9822b"
# Where an action of a grid world leads, as (column, row) with rows downwards.
MOVES: Mapping[str, Mapping[int, tuple[int, int]]] = {
    "FrozenLake": {0: (-1, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1)},
    "FrozenLake8x8": {0: (-1, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1)},
    "CliffWalking": {0: (0, -1), 1: (1, 0), 2: (0, 1), 3: (-1, 0)},
    "CliffWalkingSlippery": {0: (0, -1), 1: (1, 0), 2: (0, 1), 3: (-1, 0)},
}


def draw_curve(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str, reference: float | None = None) -> None:
    """The mean return of the episodes between two rows over the steps; rows as in `metrics.jsonl`.

    reference: a dashed line, such as the return at which an environment counts as solved.
    """
    figure = _figure(7.2, 4.0)
    axes = figure.subplots()
    drawn = [row for row in rows if row.get("return") is not None]
    axes.plot([row["step"] for row in drawn], [row["return"] for row in drawn], color=BLUE, linewidth=1.5)
    if reference is not None:
        axes.axhline(reference, color=ORANGE, linewidth=1.0, linestyle="--", label=f"{reference:g}: solved")
        axes.legend(fontsize=8, frameon=False)
    if drawn and min(row["return"] for row in drawn) < -1000:
        axes.set_yscale("symlog")  # a first walk along the cliff costs thousands and would flatten all the rest
    axes.set_xlabel("steps", fontsize=9, color=INK)
    axes.set_ylabel("return of an episode", fontsize=9, color=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save_figure(figure, path)


def grid_of(env: Any) -> tuple[tuple[int, int], str] | None:
    """((rows, columns), family) of a grid world whose states are its cells; None for every other environment."""
    inner = env.unwrapped
    family = getattr(getattr(env, "spec", None), "id", "").rpartition("-v")[0]
    shape = getattr(inner, "shape", None) or getattr(getattr(inner, "desc", None), "shape", None)
    if family not in MOVES or shape is None:
        return None
    return (int(shape[0]), int(shape[1])), family


def draw_grid(env: Any, V: Tensor, actions: Tensor | None, path: Path, *, title: str) -> bool:
    """The cells coloured by V (states,) with its figure, an arrow for the greedy action (states,), the map's letters.

    Returns False, and writes nothing, where the environment is no grid.
    """
    found = grid_of(env)
    if found is None:
        return False
    (rows, columns), family = found
    figure = _figure(max(4.6, 0.85 * columns + 1.2), 0.85 * rows + 1.1)
    axes = figure.subplots()
    values = V.reshape(rows, columns).numpy()
    image = axes.imshow(values, cmap="YlGnBu")
    figure.colorbar(image, ax=axes, shrink=0.9).ax.tick_params(labelsize=7)
    middle = (values.min() + values.max()) / 2
    for row in range(rows):
        for column in range(columns):
            colour = "white" if values[row, column] > middle else INK
            letter = _letter(env, row, column, rows, columns)
            closed = letter in ("H", "G", "C")
            axes.text(column, row + 0.33, f"{values[row, column]:.3g}", ha="center", fontsize=7, color=colour)
            if letter:
                axes.text(column - 0.34, row - 0.22, letter, ha="center", fontsize=8, color=ORANGE, weight="bold")
            if actions is not None and not closed:
                across, down = MOVES[family][int(actions[row * columns + column])]
                axes.annotate(
                    "", (column + 0.2 * across, row - 0.05 + 0.2 * down),
                    (column - 0.2 * across, row - 0.05 - 0.2 * down),
                    arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.4},
                )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    save_figure(figure, path)
    return True


def _letter(env: Any, row: int, column: int, rows: int, columns: int) -> str:
    """S start, G goal, H hole, C cliff; empty elsewhere."""
    desc = getattr(env.unwrapped, "desc", None)
    if desc is not None:
        return desc[row, column].decode().replace("F", "")
    if row < rows - 1:
        return ""
    return {0: "S", columns - 1: "G"}.get(column, "C")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    return figure
