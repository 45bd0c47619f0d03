"""`hanlin scaling fit RUN…`: a scaling law from your own small runs, and what it says of larger ones."""

import json
from pathlib import Path
from typing import Any

from hanlin.cli.parser import amount, count, figure, make_parser, whole
from hanlin.core.errors import HanlinError


def main(argv: list[str]) -> None:
    """Run `hanlin scaling`."""
    parser = make_parser(
        "scaling",
        "Fit L = E + A / N^alpha + B / D^beta to finished runs (Chinchilla, arXiv:2203.15556, approach 3).",
        examples=[
            "hanlin scaling fit runs/scaling-* --png law.png",
            "hanlin scaling fit runs/scaling-* --flops 1e20 1e21 --bootstrap 1000",
        ],
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="fit")
    fit = verbs.add_parser("fit", help="the five constants with intervals, and the best size for a budget")
    fit.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    fit.add_argument("--flops", nargs="+", type=amount, metavar="C", help="budgets to plan for (default: 10x, 100x)")
    fit.add_argument("--bootstrap", type=whole, default=400, metavar="N", help="resamplings (default: 400)")
    fit.add_argument("--level", type=float, default=0.9, metavar="P", help="mass of an interval (default: 0.9)")
    fit.add_argument("--vocab-size", type=count, metavar="N", help="where a run's model and tokenizer are not here")
    fit.add_argument("--png", type=figure, metavar="FILE", help="plot points, curves and best sizes (png, svg, pdf)")
    fit.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.level < 1:
        raise HanlinError(f"--level is {arguments.level}; it must be between 0 and 1.")

    from hanlin.plan.scaling import exponent, fit_law, isoflop, rule_of_twenty
    from hanlin.plan.scaling_runs import draw_law, read_points

    points, kind = read_points(arguments.runs, vocab_size=arguments.vocab_size)
    found = fit_law(points, bootstrap=arguments.bootstrap, level=arguments.level)
    budgets = isoflop(points)
    largest = max(p.flops for p in points)
    wanted = arguments.flops or [10 * largest, 100 * largest]
    best = [(c, *found.law.optimum(c)) for c in wanted]
    facts: dict[str, Any] = {
        "runs": [p.__dict__ | {"predicted": found.law.loss(p.parameters, p.tokens)} for p in points],
        "loss": kind,
        "law": found.law.__dict__,
        "intervals": found.intervals,
        "level": arguments.level,
        "rms_of_log_loss": found.rms,
        "isoflop": [b.__dict__ for b in budgets],
        "isoflop_exponent": exponent(budgets),
        "optimum": [
            {"flops": c, "parameters": n, "tokens": d, "loss": found.law.loss(n, d), "d_20n": rule_of_twenty(c)}
            for c, n, d in best
        ],
    }
    if arguments.png is not None:
        draw_law(points, found, budgets, arguments.png, loss=kind)
    if arguments.json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    _print(facts)
    if arguments.png is not None and not arguments.quiet:
        print(f"\nThe plot is in {arguments.png}.")


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hanlin.plan.table import quantity

    console = Console(highlight=False)

    def table(*titles: str) -> Table:
        made = Table(box=None, pad_edge=False, header_style="bright_black")
        for i, title in enumerate(titles):
            made.add_column(title, justify="left" if i == 0 else "right", overflow="fold")
        return made

    law = facts["law"]
    console.print(f"{len(facts['runs'])} runs, {facts['loss']}; rms of log loss {facts['rms_of_log_loss']:.2%}")
    console.print(f"L = {law['E']:.4f} + {law['A']:.4g} / N^{law['alpha']:.4f} + {law['B']:.4g} / D^{law['beta']:.4f}")
    for name, (low, high) in facts["intervals"].items():
        console.print(f"  {name:<6} {law[name]:>10.4g}   {facts['level']:.0%} of resamplings: {low:.4g} to {high:.4g}")
    rows = table("run", "parameters", "tokens", "loss", "law says", "off")
    for run in facts["runs"]:
        off = run["predicted"] / run["loss"] - 1
        rows.add_row(run["name"], quantity(run["parameters"]), quantity(run["tokens"]), f"{run['loss']:.4f}",
                     f"{run['predicted']:.4f}", f"{off:+.2%}")  # fmt: skip
    console.print(rows)
    if facts["isoflop"]:
        console.print("\nisoFLOP minima (approach 2)")
        rows = table("FLOPs", "parameters", "tokens", "loss", "runs", "")
        for b in facts["isoflop"]:
            rows.add_row(f"{b['flops']:.3g}", quantity(b["parameters"]), quantity(b["tokens"]), f"{b['loss']:.4f}",
                         str(b["runs"]), "" if b["inside"] else "beyond the runs")  # fmt: skip
        console.print(rows)
        if facts["isoflop_exponent"] is not None:
            console.print(f"N_opt ~ C^{facts['isoflop_exponent']:.3f} (Chinchilla: 0.49)")
    console.print("\nBest size for a budget")
    rows = table("FLOPs", "parameters", "tokens", "tokens a parameter", "loss", "D = 20 N would be")
    for row in facts["optimum"]:
        n, d = row["d_20n"]
        rows.add_row(f"{row['flops']:.3g}", quantity(row["parameters"]), quantity(row["tokens"]),
                     f"{row['tokens'] / row['parameters']:.1f}", f"{row['loss']:.4f}",
                     f"{quantity(n)} on {quantity(d)}")  # fmt: skip
    console.print(rows)
