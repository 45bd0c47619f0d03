"""Checkpoints while training goes on: what a save every 20 steps costs, in the background and at once.

One process trains a model of about 97.5M parameters; blocks of 20 steps take turns: without a save, with one in the
background before them, with one at once. Weights and AdamW's moments are 12 bytes a parameter.

    pause   seconds that the loop stands still for one save
    cost    how much longer a block takes than one without a save, median of the turns; and, because the wall clock of a
            machine that others use is noisy, the processor seconds of the writing thread over those of a block

    python benchmarks/bench_checkpoint.py [--turns 5] [--size 100m] [--steps 20] [--folder DIR]
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

from bench_train import SIZES, model_config
from harness import THREADS, write_results

SIDES = ("none", "background", "at once")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--size", choices=list(SIZES), default="100m")
    parser.add_argument("--steps", type=int, default=20, help="between two saves")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parameters, found, writing = measure(options.size, options.turns, options.steps, Path(folder))
    plain = statistics.median(block for block, _, _ in found["none"])
    busy = statistics.median(cpu for _, _, cpu in found["none"])
    at_once = statistics.median(pause for _, pause, _ in found["at once"])
    rows = []
    for side, blocks in found.items():
        wall, pause = (statistics.median(values) for values in list(zip(*blocks, strict=True))[:2])
        rows.append({
            "parameters": f"{parameters / 1e6:.1f}M",
            "save": side,
            "pause, s": f"{pause:.3f}",
            "of one at once": f"{pause / at_once:.2f}",
            f"{options.steps} steps, s": f"{wall:.2f}",
            "cost, wall": f"{wall / plain - 1:+.1%}",
            "cost, processor": f"{(writing + pause * THREADS) / busy:.1%}" if side == "background" else "",
        })  # fmt: skip
    write_results("checkpoint", rows, {"blocks (wall, pause, processor)": found, "writing, processor s": writing})


def measure(size: str, turns: int, steps: int, folder: Path) -> tuple[int, dict[str, list[tuple]], float]:
    """(parameters; wall, pause and processor seconds of each block of a side; processor seconds of a write)"""
    import torch

    from hanlin.core.device import tune_allocator
    from hanlin.core.runs import Run
    from hanlin.data.batch import Batch, document_positions, next_token_targets
    from hanlin.models import Transformer
    from hanlin.parallel.processes import Processes
    from hanlin.train import CausalLM
    from hanlin.train.choices import AdamW
    from hanlin.train.keeper import Keeper
    from hanlin.train.objective import step_loss
    from hanlin.train.optim import build_optimizer
    from hanlin.train.precision import Precision, training_mode
    from hanlin.train.saving import Laid, TrainState, take_checkpoint

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tune_allocator()
    _, _, vocabulary, length, _, _, _, batch = SIZES[size]
    ids = torch.randint(0, vocabulary, (batch, length))
    documents = torch.zeros_like(ids)
    rows = Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents)
    model = Transformer(model_config(size)).train()
    optimizer, objective, laid = build_optimizer(model, AdamW(), 1e-4), CausalLM(), Laid.whole(model)
    totals = objective.count(rows)
    writing: list[float] = []

    class Timed(Keeper):
        """Notes the processor seconds of the thread that writes."""

        def _write(self, *arguments) -> None:
            start = time.thread_time()
            super()._write(*arguments)
            if threading.current_thread() is not threading.main_thread():
                writing.append(time.thread_time() - start)

    keepers = {
        side: Timed(Run.open(folder / side), Processes.here(), keep_last=1, notice=print, background=side != "at once")
        for side in ("background", "at once")
    }

    def block(side: str, count: int, number: int) -> tuple[float, float, float]:
        start, busy, pause = time.perf_counter(), time.process_time(), 0.0
        if side != "none":
            keepers[side].save(take_checkpoint(laid, optimizer, TrainState(step=number), {}), None)
            pause = time.perf_counter() - start
        for _ in range(count):
            step_loss(objective.loss(model, rows)[0], totals).backward()
            optimizer.step(1.0)
            for parameter in model.parameters():
                parameter.grad = None
        if side != "none":
            keepers[side].finish()  # a write that is slower than a block counts with it
        return time.perf_counter() - start, pause, time.process_time() - busy

    found: dict[str, list[tuple]] = {side: [] for side in SIDES}
    with training_mode(model, precision=Precision.choose("auto", torch.device("cpu"))):
        block("none", 2, 0)
        for side in keepers:  # once, so that buffers and folders are there
            block(side, 1, 0)
        writing.clear()
        for turn in range(turns):
            for place in range(len(SIDES)):  # another order each turn
                side = SIDES[(turn + place) % len(SIDES)]
                found[side].append(block(side, steps, turn + 1))
                print(f"turn {turn + 1}/{turns} {side}: {found[side][-1][0]:.2f} s, pause {found[side][-1][1]:.3f} s",
                      flush=True)  # fmt: skip
    os.sync()
    return sum(p.numel() for p in model.parameters()), found, statistics.median(writing)


if __name__ == "__main__":
    main()
