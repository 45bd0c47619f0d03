"""What run folders tell afterwards: a line a run, what two recipes differ in, curves over one another.

Read from `recipe.yaml` and `metrics.jsonl` alone, so it works while a run is going, after `kill -9`, and on a copy.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hanlin.core.errors import HanlinError
from hanlin.core.figures import save_figure
from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run

EVALUATION = "eval/"


@dataclass(frozen=True)
class RunHistory:
    """path: the run folder; recipe: as resolved (empty if it has none that can be read); rows: of `metrics.jsonl`;
    changed: when its metrics were last written, seconds since 1970; damage: what is wrong with its recipe, if
    anything."""

    path: Path
    recipe: dict[str, Any]
    rows: list[dict[str, Any]]
    changed: float
    damage: str | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether the model folder stands there: it is written when the last step is done."""
        return (self.path / "model").is_dir()

    @property
    def steps(self) -> int | None:
        """How many it is to make, where the recipe says."""
        found = self._said("train", "steps")
        return found if isinstance(found, int) else None

    def last(self, key: str) -> float | None:
        """The newest finite value of `key`."""
        values = self.curve(key)
        return values[-1][1] if values else None

    def best(self, key: str) -> float | None:
        """The smallest value of `key`."""
        return min((value for _, value in self.curve(key)), default=None)

    def curve(self, key: str, *, by: str = "step") -> list[tuple[float, float]]:
        """(place, value) of every line that has both; by: `step`, `tokens` or `time`."""
        return [
            (float(row[by]), float(row[key]))
            for row in self.rows
            if isinstance(row.get(key), int | float) and isinstance(row.get(by), int | float)
            and math.isfinite(row[key])
        ]  # fmt: skip

    def names(self) -> list[str]:
        """Names of all numbers, in the order in which they first came."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in ("step", "tokens", "time") and self.curve(name)]

    def summary(self) -> dict[str, Any]:
        """One flat JSON object: what `hanlin runs list` shows."""
        return {
            "name": self.name,
            "kind": self._said("objective", "kind"),
            "step": int(self.last("step") or 0),
            "steps": self.steps,
            "finished": self.finished,
            "tokens": int(self.last("tokens") or 0),
            "loss": self.last("loss"),
            "eval/loss": self.last("eval/loss"),
            "best eval/loss": self.best("eval/loss"),
            "tokens_per_s": self.last("tokens_per_s"),
            "seconds": self.last("time"),
            "changed": time.strftime("%Y-%m-%d %H:%M", time.localtime(self.changed)),
        }

    def _said(self, section: str, name: str) -> Any:
        found = self.recipe.get(section)
        return found.get(name) if isinstance(found, Mapping) else None


def read_run(path: Path) -> RunHistory:
    """The history of one run folder; `HanlinError` if it is none. A damaged recipe counts as empty and is named."""
    run = Run(path)
    if not run.metrics.is_file():
        there = "is no run folder: it holds no metrics.jsonl" if path.is_dir() else "does not exist"
        raise HanlinError(f"{path} {there}. `hanlin runs list` shows the runs.")
    recipe, damage = _read_recipe(run.recipe)
    return RunHistory(path, recipe, read_metrics(run.metrics), run.metrics.stat().st_mtime, damage)


def find_runs(root: Path) -> list[RunHistory]:
    """Every run below `root`, the newest last. A damaged recipe does not hide its run."""
    found = [read_run(metrics.parent) for metrics in root.rglob("metrics.jsonl") if metrics.is_file()]
    return sorted(found, key=lambda run: (run.changed, run.path))


def differences(runs: Sequence[RunHistory]) -> dict[str, list[Any]]:
    """{"train.lr": [0.001, 0.002]}: every value of the recipes in which the runs are not all alike, None where absent.
    The names of the runs themselves are left out."""
    flat = [recipe_values(run.recipe) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = {key: [values.get(key) for values in flat] for key in keys if key not in ("name", "runs")}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def plot_runs(runs: Sequence[RunHistory], keys: Sequence[str], out: Path, *, by: str = "step") -> None:
    """One panel a key, one line a run, written to `out` (its ending says the format: png, svg, pdf). Without a key
    there is nothing to draw: a `HanlinError`."""
    from matplotlib.figure import Figure

    if not keys:
        raise HanlinError(
            f"There is no curve to draw: {', '.join(str(run.path) for run in runs)} logged no number yet."
        )
    wide = min(3, len(keys))
    tall = -(-len(keys) // wide)
    figure = Figure(figsize=(5.2 * wide, 3.4 * tall), layout="constrained")
    for place, key in enumerate(keys, start=1):
        axes = figure.add_subplot(tall, wide, place)
        for run in runs:
            if curve := run.curve(key, by=by):
                dots = "o" if len(curve) < 15 else None
                axes.plot(*zip(*curve, strict=True), label=run.name, linewidth=1.4, marker=dots, markersize=3)
        axes.set_title(key, fontsize=10)
        axes.set_xlabel({"time": "seconds"}.get(by, by), fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 1:
            axes.legend(fontsize=8, frameon=False)
    save_figure(figure, out, dpi=130)


def recipe_values(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.lr": 0.001, ...}: a recipe flat, each value by its path."""
    return dict(_leaves(recipe))


def _read_recipe(file: Path) -> tuple[dict[str, Any], str | None]:
    """(the recipe, what is wrong with it); one that cannot be used is empty."""
    if not file.is_file():
        return {}, None
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return {}, f"{file} is no UTF-8 text"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        return {}, f"{file} is no YAML" + (f" (line {mark.line + 1})" if mark else "")
    if found is None:
        return {}, None
    if not isinstance(found, dict):
        return {}, f"{file} holds a {type(found).__name__}, not the sections of a recipe"
    return found, None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
