"""`hanlin plan`: predicted beside measured, bytes and seconds of an optimizer step, on this machine.

Memory: the step's peak from the model's own code on fake tensors (`plan.memory`) against the largest running sum of the
profiler's allocator events over two real steps (`plan.measure`); weights, batches and the optimiser's state included.
Every case is a process of its own. Time: the seconds of the same step from rates measured on this machine
(`plan.seconds`, `plan.calibrate`) against the fastest of several real steps; predictions are made before the steps run.

    python benchmarks/bench_plan.py [memory] [time] [--only NAME ...]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["memory", "time"], help="memory, time or both")
    parser.add_argument("--only", nargs="*", help="these cases alone; nothing is written")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the memory of this case, in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_memory(options.one)))
        return
    from plan_cases import MEMORY

    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "memory" in options.what:
        rows = [in_own_process(name) for name in options.only or MEMORY]
        show_memory(rows)
        found["memory"] = rows
    if "time" in options.what:
        rows = timed(options.only)
        show_time(rows)
        found["time"] = rows
    if not options.only:
        from hanlin.core.device import machine_summary

        rest = {name: rows for name, rows in found.items() if name != "machine"}
        RESULTS.write_text(json.dumps({"machine": machine_summary(), **rest}, indent=1) + "\n")


def in_own_process(name: str) -> dict[str, Any]:
    ran = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{name}: {ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def one_memory(name: str) -> dict[str, Any]:
    """Predict, then measure, one case."""
    from hanlin.plan.measure import measured_peak
    from hanlin.plan.memory import step_memory
    from plan_cases import MEMORY

    config, work = MEMORY[name]
    start = time.perf_counter()
    predicted = step_memory(config, work, way="whole")
    seconds = time.perf_counter() - start
    put_together = step_memory(config, work, way="layers")
    measured = measured_peak(config, work)
    return {
        "case": name, "predicted": predicted.peak, "layers": put_together.peak, "measured": measured.peak,
        "error": predicted.peak / measured.peak - 1, "layers_error": put_together.peak / measured.peak - 1,
        "parts": predicted.parts, "moment": predicted.moment, "seconds": round(seconds, 2),
    }  # fmt: skip


def show_memory(rows: list[dict[str, Any]]) -> None:
    print("| step | predicted MB | measured MB | error % | by layers % | fullest at |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for r in rows:
        print(
            f"| {r['case']} | {r['predicted'] / 1e6:.1f} | {r['measured'] / 1e6:.1f} | {100 * r['error']:+.2f} | "
            f"{100 * r['layers_error']:+.2f} | {r['moment']} |"
        )
    worst = max(abs(r["error"]) for r in rows)
    print(f"\n{len(rows)} steps: worst error {100 * worst:.2f} %, median "
          f"{100 * statistics.median(abs(r['error']) for r in rows):.2f} %\n")  # fmt: skip


def timed(
    only: list[str] | None, *, rounds: int = 2, steps: int = 5, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, Any]]:
    """Rates, then every model's steps, then rates and steps again: the fastest of each counts, so that what else this
    machine did at one of the two moments counts for nothing."""
    import torch

    from hanlin.core.device import tune_allocator
    from hanlin.plan.calibrate import fastest_of, measure_rates
    from hanlin.plan.measure import measured_seconds
    from hanlin.plan.seconds import price
    from hanlin.plan.trace import trace_step
    from hanlin.plan.work import open_bench
    from plan_cases import TIME

    tune_allocator()
    names = only or list(TIME)
    work = {name: trace_step(*TIME[name]) for name in names}
    measured: dict[str, list[float]] = {name: [] for name in names}
    found = []
    for _ in range(rounds):
        found.append(measure_rates(clock=clock))
        for name in names:
            bench = open_bench(*TIME[name], torch.device("cpu"))
            measured[name] += measured_seconds(bench, steps=steps, clock=clock)
    rates = fastest_of(found)
    rows = []
    for name in names:
        predicted, best = price(work[name], rates), min(measured[name])
        rows.append({
            "case": name, "predicted": predicted.total, "measured": best, "median": statistics.median(measured[name]),
            "error": predicted.total / best - 1, "gflops": predicted.flops / best / 1e9, "parts": predicted.parts,
        })  # fmt: skip
    return rows


def show_time(rows: list[dict[str, Any]]) -> None:
    print("| step | predicted ms | fastest ms | median ms | error % | GFLOP/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        print(
            f"| {r['case']} | {1e3 * r['predicted']:.1f} | {1e3 * r['measured']:.1f} | {1e3 * r['median']:.1f} | "
            f"{100 * r['error']:+.1f} | {r['gflops']:.0f} |"
        )
    errors = [abs(r["error"]) for r in rows]
    print(
        f"\n{len(rows)} models: median error {100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} %\n"
    )


if __name__ == "__main__":
    main()
