"""The one benchmark harness: sides interleaved, a calibration around every run, medians, ratios of one hour.

A side is a *command* that prints one JSON line: each runs in a process of its own (so allocators, thread pools and
imports cannot help or harm each other), and the sides take turns. In every process the machine is measured too, with a
bf16 and an fp32 matrix product and a read of memory; a run whose calibration sagged below 80 % of the best is marked
disturbed and taken again.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
THREADS = os.cpu_count() or 1


def calibrate(seconds: float = 0.6) -> dict[str, float]:
    """GFLOP/s of a 2048^3 product in fp32 and bf16, GB/s of a 256 MiB read: best of what fits into `seconds` each."""
    import torch

    torch.set_num_threads(THREADS)
    result = {}
    for name, dtype in (("gemm_fp32", torch.float32), ("gemm_bf16", torch.bfloat16)):
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        out = torch.empty(2048, 2048, dtype=dtype)
        result[name] = 2 * 2048**3 / best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds) / 1e9
    x = torch.ones(64 * 2**20)
    result["read_gb_s"] = x.numel() * 4 / best_seconds(lambda: x.sum(), seconds) / 1e9
    return result


def best_seconds(work: Callable[[], Any], budget: float) -> float:
    """The fastest of the calls that fit into `budget` seconds (at least three)."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def interleave(
    sides: Mapping[str, Sequence[str]],
    *,
    runs: int,
    calibration: str = "gemm_bf16",
    retries: int = 4,
    once: Collection[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Run every side `runs` times, taking turns; each command prints its result as the last line, in JSON, with the
    `calibration` measured in its own process. Runs below 80 % of the best calibration are repeated up to `retries`
    times and else kept with `disturbed: true`. once: sides that take minutes to start run in the first turn only."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    best = 0.0
    for turn in range(runs):
        for name, command in sides.items():
            if turn and name in once:
                continue
            for attempt in range(retries + 1):
                row = run_side(command)
                speed = row["calibration"][calibration]
                best = max(best, speed)
                row["disturbed"] = speed < 0.8 * best
                if not row["disturbed"] or attempt == retries:
                    break
            results[name].append(row)
            print(f"  run {turn + 1}/{runs} {name}: {row['value']:.1f}{' (disturbed)' if row['disturbed'] else ''}",
                  file=sys.stderr)  # fmt: skip
    return results


def run_side(command: Sequence[str]) -> dict[str, Any]:
    """One process; its last line of output as JSON."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(rows: Sequence[Mapping[str, Any]], key: str = "value") -> float:
    """Median over the undisturbed runs, or over all where none was quiet."""
    quiet = [row[key] for row in rows if not row["disturbed"]]
    return statistics.median(quiet or [row[key] for row in rows])


def spread(rows: Sequence[Mapping[str, Any]], key: str = "value") -> str:
    values = [row[key] for row in rows]
    return f"{min(values):,.0f}–{max(values):,.0f}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; columns in the order of the first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_results(name: str, rows: Sequence[Mapping[str, Any]], raw: Any = None) -> Path:
    """Print the table, write `results/NAME.json` with versions and machine."""
    print(table(rows))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    value = {"benchmark": name, "machine": machine(), "rows": list(rows), "raw": raw}
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    return {
        "cpu": cpu,
        "cores": THREADS,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "date": time.strftime("%Y-%m-%d"),
    }
