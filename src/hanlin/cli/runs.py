"""`hanlin runs list | show | compare | watch`: what run folders tell, as tables and plots, and live on a page."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import figure, make_parser
from hanlin.core.errors import HanlinError, require

if TYPE_CHECKING:
    from hanlin.train.history import RunHistory

CURVES = ("loss", "eval/loss", "grad_norm", "lr", "tokens_per_s")
BLOCKS = "▁▂▃▄▅▆▇█"


def main(argv: list[str]) -> None:
    parser = make_parser(
        "runs",
        "Look at run folders: what there is, how one went, what two differ in.",
        examples=[
            "hanlin runs list",
            "hanlin runs show runs/pretrain-tiny --png curves.png",
            "hanlin runs show runs/grpo-sums --health",
            "hanlin runs compare runs/a runs/b --png both.png --by tokens",
            "hanlin runs watch runs",
            "hanlin runs list --root /data/runs --json",
        ],
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="list | show | compare | watch")
    listing = what.add_parser("list", help="a line a run, the newest last")
    listing.add_argument("--root", type=Path, default=Path("runs"), help="folder of run folders (default: runs)")
    show = what.add_parser("show", help="the recipe, the last values and a curve of one run")
    show.add_argument("runs", nargs=1, type=Path, metavar="RUN", help="run folder")
    show.add_argument("--health", action="store_true", help="write health.png and report.md into it; print its alarms")
    compare = what.add_parser("compare", help="what the recipes differ in, the values and curves side by side")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    for one in (show, compare):
        one.add_argument("--png", type=figure, metavar="FILE", help="write the curves to this file (png, svg, pdf)")
        one.add_argument("--keys", nargs="+", metavar="KEY", help=f"which curves (default: {', '.join(CURVES)})")
        one.add_argument("--by", choices=("step", "tokens", "time"), default="step", help="along which axis")
    watch = what.add_parser("watch", help="a page that follows the runs of a folder, with alarms and answers")
    watch.add_argument("root", nargs="?", type=Path, default=Path("runs"), help="folder of run folders (default: runs)")
    watch.add_argument("--port", type=int, default=8001, help="port to listen on (0: any free one; default 8001)")
    for one in (listing, show, compare):
        one.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if arguments.what == "list":
        _list(arguments.root, arguments.json)
    elif arguments.what == "watch":
        _watch(arguments.root, arguments.port, quiet=arguments.quiet)
    else:
        _compare(arguments)
        if arguments.what == "show" and arguments.health:
            _write_health(arguments.runs[0], as_json=arguments.json)


def _list(root: Path, as_json: bool) -> None:
    from hanlin.train.history import find_runs

    if not root.is_dir():
        raise HanlinError(f"There is no folder {root}; --root says where the run folders are.")
    runs = find_runs(root)
    _name_damage(runs)
    rows: list[dict[str, Any]] = [run.summary() | {"path": str(run.path)} for run in runs]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    if not rows:
        raise HanlinError(f"No run below {root}: none of its folders holds a metrics.jsonl.")
    titles = ["run", "kind", "step", "tokens", "loss", "eval/loss", "tokens/s", "took", "last written", ""]
    table = [
        [
            row["path"], row["kind"] or "", f"{row['step']}" + (f"/{row['steps']}" if row["steps"] else ""),
            _count(row["tokens"]), _figure(row["loss"]), _figure(row["eval/loss"]), _count(row["tokens_per_s"]),
            _duration(row["seconds"]), row["changed"], "finished" if row["finished"] else "",
        ]
        for row in rows
    ]  # fmt: skip
    _print_table(titles, table, left=(0, 1, 8, 9))


def _compare(arguments: Any) -> None:
    from hanlin.train.history import differences, plot_runs, read_run, recipe_values

    runs = [read_run(path) for path in arguments.runs]
    _name_damage(runs)
    known = list(dict.fromkeys(key for run in runs for key in run.names()))
    keys = arguments.keys or [key for key in CURVES if key in known] or known[:6]
    if unknown := [key for key in keys if key not in known]:
        there = f"there are: {', '.join(known)}" if known else "none has logged a number yet"
        raise HanlinError(f"No run has a curve {unknown[0]!r}; {there}.")
    changed = differences(runs) if len(runs) > 1 else {}
    if arguments.png:
        plot_runs(runs, keys, arguments.png, by=arguments.by)
    if arguments.json:
        found = {
            "runs": [run.summary() | {"path": str(run.path), "recipe": run.recipe} for run in runs],
            "differences": changed,
            "curves": {key: {str(run.path): run.curve(key, by=arguments.by) for run in runs} for key in keys},
        }
        print(json.dumps(found, ensure_ascii=False, indent=1))
    elif arguments.what == "show":
        _show(runs[0], known, keys, arguments.by, recipe_values(runs[0].recipe))
    else:
        names = [str(run.path) for run in runs]
        values = [[key, *(_figure(run.last(key)) for run in runs)] for key in known]
        bests = [["best eval/loss", *(_figure(run.best("eval/loss")) for run in runs)]]
        _print_table(["last value", *names], values + bests * ("eval/loss" in known), left=(0,))
        if changed:
            print()
            rows = [[key, *(_short(value) for value in found)] for key, found in changed.items()]
            _print_table(["recipes differ in", *names], rows, left=(0,))
    if arguments.png and not arguments.json:
        print(f"\nThe curves are in {arguments.png}.")


def _watch(root: Path, port: int, *, quiet: bool) -> None:
    require("nicegui", "studio")
    if not root.is_dir():
        raise HanlinError(f"There is no folder {root}: give the folder of run folders, or one run folder.")
    from hanlin.studio.watch import watch_runs

    watch_runs(root, port=port, quiet=quiet)


def _write_health(folder: Path, *, as_json: bool) -> None:
    from hanlin.align.health import Health
    from hanlin.align.health_report import FIGURE, REPORT, write_health
    from hanlin.core.metrics import read_metrics
    from hanlin.core.runs import Run

    run = Run(folder)
    write_health(run)
    if as_json:
        return
    alarms = Health.over(read_metrics(run.metrics)).alarms
    print()
    for alarm in alarms:
        print(f"Step {alarm.step:g}: {alarm.text}")
    print(f"{'' if alarms else 'No alarm. '}The panels are in {folder / FIGURE}, the report in {folder / REPORT}.")


def _show(run: "RunHistory", known: list[str], keys: list[str], by: str, recipe: dict[str, Any]) -> None:
    """The recipe, the last values, and a small curve of each of `keys`."""
    state = run.summary()
    steps = f"{state['step']}" + (f" of {state['steps']}" if state["steps"] else "")
    print(f"{run.path}: step {steps}, {'finished' if state['finished'] else 'not finished'}\n")
    if recipe:
        _print_table(["recipe", ""], [[key, _short(value, 80)] for key, value in recipe.items()], left=(0, 1))
        print()
    rows = [[key, _figure(run.last(key)), _sparks(run.curve(key, by=by)) if key in keys else ""] for key in known]
    if "eval/loss" in known:
        rows.append(["best eval/loss", _figure(run.best("eval/loss")), ""])
    _print_table(["last value", "", f"curve by {by}"], rows, left=(0, 2))


def _sparks(curve: Sequence[tuple[float, float]], width: int = 40) -> str:
    """The values as one line of blocks, the largest highest: the mean of each of `width` equal spans of the axis."""
    if not curve:
        return ""
    begin, end = curve[0][0], curve[-1][0]
    spans: list[list[float]] = [[] for _ in range(min(width, len(curve)))]
    for at, value in curve:
        share = (at - begin) / (end - begin) if end > begin else 0.0
        spans[min(len(spans) - 1, max(0, int(share * len(spans))))].append(value)
    means = [sum(span) / len(span) for span in spans if span]
    low, high = min(means), max(means)
    return "".join(BLOCKS[round((mean - low) / (high - low) * 7) if high > low else 0] for mean in means)


def _name_damage(runs: "Sequence[RunHistory]") -> None:
    for run in runs:
        if run.damage is not None:
            print(f"hanlin: {run.damage}; it counts as empty.", file=sys.stderr)


def _print_table(titles: list[str], rows: list[list[str]], *, left: tuple[int, ...]) -> None:
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(value: Any, longest: int = 40) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."
