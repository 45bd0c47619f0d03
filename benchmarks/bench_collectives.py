"""The collectives as messages (`hanlin.parallel.lessons`) beside torch's own, on 4 processes of this machine over gloo.

Bytes: the most that one rank sends, as `parallel.tracer` counts them in the run. Steps: messages that follow each
other. S is the whole tensor, fp32. Ours and torch's take turns in the same processes; a call's time is the slowest
rank's; the figure is the median of the runs. On one machine messages go through its memory, so this shows the shape of
the costs and not a network's.

    python benchmarks/bench_collectives.py [--runs 9]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

N = 4
SIZES = {"1 MB": 2**20, "16 MB": 2**24}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    import torch.multiprocessing as multiprocessing

    import harness

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (folder, runs), nprocs=N)
        ranks = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(N)]
    rows: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for calls in zip(*ranks, strict=True):
        about = calls[0]
        times = {side: [max(call[side][run] for call in calls) for run in range(runs)] for side in ("ours", "torch")}
        middle = {side: statistics.median(found) for side, found in times.items()}
        sent = max(call["sent"] for call in calls)
        rows.append(
            {
                "collective": about["name"],
                "S": about["size"],
                "bytes a rank sent": f"{sent:,}",
                "of S": f"{sent / SIZES[about['size']]:.2f}",
                "steps": about["steps"],
                "ours, ms": f"{middle['ours'] * 1e3:.2f}",
                "torch's, ms": f"{middle['torch'] * 1e3:.2f}",
                "ratio": f"{middle['ours'] / middle['torch']:.2f}",
            }
        )
        kept.append({"name": about["name"], "size": about["size"], "seconds": times})
    raw = {"ranks": N, "runs": runs, "load_average_before": load, "calls": kept}
    harness.write_results("collectives", rows, raw)


def measure(rank: int, folder: str, runs: int) -> None:
    """One process: for each call {name, size, steps, sent, ours: seconds, torch: seconds}, as JSON in `folder`/rank."""
    import torch
    import torch.distributed as dist

    from hanlin.parallel.lessons import eight, ring_all_reduce
    from hanlin.parallel.tracer import Tracer

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=N)
    told: list[dict[str, Any]] = []
    for size, count in SIZES.items():
        for name, (ours, theirs) in sides(torch.randn(count // 4), rank).items():
            if name == "all_reduce, ring":
                steps = ring_all_reduce.steps(N)
            else:
                steps = eight.cost(name.split(",")[0], count, N, rank).steps
            with Tracer() as tracer:
                ours()
            theirs()
            seconds: dict[str, list[float]] = {"ours": [], "torch": []}
            for _ in range(runs):
                for side, call in (("ours", ours), ("torch", theirs)):
                    dist.barrier()
                    start = time.perf_counter()
                    call()
                    seconds[side].append(time.perf_counter() - start)
            told.append(
                {"name": name, "size": size, "steps": steps, "sent": tracer.bytes().get("send", 0), **seconds}
            )  # fmt: skip
    Path(folder, str(rank)).write_text(json.dumps(told))
    dist.destroy_process_group()


def sides(whole: Any, rank: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """{collective: (ours, torch's)} over a tensor of S bytes, or its N-th where ranks hold one each."""
    import torch
    import torch.distributed as dist

    from hanlin.parallel.lessons import eight
    from hanlin.parallel.lessons.ring_all_reduce import ring_all_reduce

    parts = whole.view(N, -1)
    part, found, other = parts[rank].clone(), torch.empty_like(parts), torch.empty_like(parts[0])
    root = rank == 0
    return {
        "broadcast": (lambda: eight.broadcast(whole), lambda: dist.broadcast(whole, 0)),
        "reduce": (lambda: eight.reduce(whole), lambda: dist.reduce(whole.clone(), 0)),
        "scatter": (
            lambda: eight.scatter(other, parts if root else None),
            lambda: dist.scatter(other, list(parts) if root else None, src=0),
        ),
        "gather": (
            lambda: eight.gather(part),
            lambda: dist.gather(part, list(found) if root else None, dst=0),
        ),
        "all_gather": (lambda: eight.all_gather(part), lambda: dist.all_gather(list(found), part)),
        "reduce_scatter": (lambda: eight.reduce_scatter(parts), lambda: dist.reduce_scatter(other, list(parts))),
        "all_to_all": (lambda: eight.all_to_all(parts), lambda: dist.all_to_all_single(found, parts)),
        "all_reduce, tree": (lambda: eight.all_reduce(whole), lambda: dist.all_reduce(whole.clone())),
        "all_reduce, ring": (lambda: ring_all_reduce(whole.clone()), lambda: dist.all_reduce(whole.clone())),
    }


if __name__ == "__main__":
    main()
