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
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["memory", "time"], help="memory, time or both")
    parser.add_argument("--only", nargs="*", help="these cases alone; nothing is written")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # memory NAME: in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps({"memory": one_memory, "time": one_time}[options.one[0]](options.one[1])))
        return
    from plan_cases import MEMORY

    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "memory" in options.what:
        rows = [in_own_process("memory", name) for name in options.only or MEMORY]
        show_memory(rows)
        found["memory"] = rows
    if "time" in options.what:
        rows = timed(options.only)
        show_time(rows)
        found["time"] = rows
    if not options.only:
        from hanlin.core.device import machine_summary

        RESULTS.write_text(json.dumps({"machine": machine_summary(), **{k: found[k] for k in found if k != "machine"}}, indent=1))


def in_own_process(what: str, name: str) -> dict[str, Any]:
    ran = subprocess.run([sys.executable, __file__, "--one", what, name], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{name}: {ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def one_memory(name: str) -> dict[str, Any]:
    """Predict, then measure, one case."""
    import time

    from plan_cases import MEMORY

    from hanlin.plan.measure import measured_peak
    from hanlin.plan.memory import step_memory

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


def one_time(name: str) -> dict[str, Any]:
    raise NotImplementedError


def timed(only: list[str] | None) -> list[dict[str, Any]]:
    raise NotImplementedError


def show_time(rows: list[dict[str, Any]]) -> None:
    raise NotImplementedError


if __name__ == "__main__":
    main()
