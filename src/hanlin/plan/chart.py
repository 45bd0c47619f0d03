"""Bars: the memory of a rank by category, beside what the device has. In the terminal, and as a PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanlin.core.figures import save_figure

GIB = 2**30
INK, GREY = "#24292f", "#8c959f"
COLOURS = {
    "weights": "#2f6fb2", "gradients": "#d9822b", "optimiser": "#4a9c6d", "casts": "#7fb0e0", "activations": "#c0504d",
    "loss": "#8064a2", "buffers": "#b0a048", "communication": "#5fb0b0", "cache": "#c0504d", "prompts": "#8064a2",
}  # fmt: skip
SPARE = "#8c959f"


@dataclass(frozen=True)
class Bar:
    """One device: what it holds, {category: bytes}, and what it has."""

    title: str
    parts: Mapping[str, float]
    room: float


def terminal_bar(bar: Bar, width: int = 60) -> list[str]:
    """Lines in rich's markup: one bar as long as the device's memory, then a line for each category."""
    total, longest = sum(bar.parts.values()), max(bar.room, sum(bar.parts.values()))
    cells = _cells([*bar.parts.values(), max(0.0, longest - total)], width)
    scale, unit = memory_unit(total)
    blocks = [f"[{_colour(name)}]{'█' * n}[/]" for name, n in zip(bar.parts, cells, strict=False)]
    over = f"  [bold red]{(total - bar.room) / GIB:.1f} GiB too much[/]" if total > bar.room else ""
    held = "" if unit == "GiB" else f" {unit}"
    lines = [
        f"{''.join(blocks)}[bright_black]{'░' * cells[-1]}[/] "
        f"{total / scale:.1f}{held} of {bar.room / GIB:.1f} GiB{over}"
    ]
    for name, size in bar.parts.items():
        if size >= 0.0005 * total:
            lines.append(f"  [{_colour(name)}]■[/] {name:<14}{size / scale:>9.2f} {unit} {size / total:>6.1%}")
    return lines


def memory_unit(most: float) -> tuple[float, str]:
    """(bytes, name) of the unit in which sizes up to `most` are shown: GiB, or MiB below one GiB."""
    return (GIB, "GiB") if most >= GIB else (2**20, "MiB")


def draw_memory(bars: Sequence[Bar], path: Path, *, title: str) -> None:
    """Horizontal stacked bars, one a device, with a line at its memory; the format is the name's (png, svg, pdf)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.9 + 0.55 * len(bars)), dpi=120, facecolor="white")
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    axes = figure.subplots()
    names = list(dict.fromkeys(name for bar in bars for name, size in bar.parts.items() if size > 0))
    rows = list(range(len(bars)))[::-1]
    left = [0.0] * len(bars)
    for name in names:
        sizes = [bar.parts.get(name, 0.0) / GIB for bar in bars]
        axes.barh(rows, sizes, left=left, height=0.6, color=_colour(name), label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    longest = max([*left, *(bar.room / GIB for bar in bars)])
    for row, bar, end in zip(rows, bars, left, strict=True):
        axes.plot([bar.room / GIB] * 2, [row - 0.4, row + 0.4], color=INK, linewidth=2)
        beside = bar.room / GIB if 0.85 * bar.room / GIB < end <= bar.room / GIB else end
        axes.text(beside + 0.008 * longest, row, f"{end:.1f} GiB", va="center", fontsize=9, color=INK)
    axes.set_yticks(rows, [bar.title for bar in bars], fontsize=9)
    axes.set_xlim(0, 1.12 * longest)
    axes.set_xlabel("GiB on the fullest device; the line is what the device has", fontsize=9, color=INK)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    _dress(axes)
    figure.legend(loc="outside lower center", ncols=min(8, len(names)), fontsize=8, frameon=False)
    save_figure(figure, path)


def _dress(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _colour(name: str) -> str:
    return COLOURS.get(name, SPARE)


def _cells(sizes: Sequence[float], width: int) -> list[int]:
    """Whole cells for each size that add up to `width`, the largest remainders rounded up."""
    total = sum(sizes) or 1.0
    exact = [size / total * width for size in sizes]
    cells = [int(x) for x in exact]
    for i in sorted(range(len(sizes)), key=lambda i: cells[i] - exact[i])[: width - sum(cells)]:
        cells[i] += 1
    return cells
