"""Checkpoints while training goes on: what a save every 20 steps costs, in the background and at once.

One `Trainer` trains a model of 10.5M, then one of 97.5M parameters (85M without its embeddings); blocks of some steps
take turns within that one run: without a save, with one in the background before them, with one at once. A block ends
when its write has ended. Weights and AdamW's moments are 12 bytes a parameter.

    pause   seconds that the loop stands still for one save: the copies of the tensors, or all of the writing
    block   the median pause, the median wait at its end and, of each of its steps, the median over the turns: what
            other programs take from a turn falls out of it
    cost    how much longer a block is than one without a save, over 20 steps. Aim: 2 %, and a quarter of the pause of
            a save at once
    bound   processor seconds of the writing thread and of the pause, over those of 20 steps: what it costs where no
            core is ever idle, whatever else the machine does meanwhile
    noise   half of (75th - 25th percentile) over the median of the blocks without a save, and how many blocks were left
            out because other programs had more than a tenth of the processors in their steps; turns go on until there
            are enough of the others (five times as many at most; then the disturbed ones count too)

What it taught: the pause is a tenth of that of a save at once, but the training still pays for what the write computes,
nearly all of it: while every core is busy, a step waits for the slower of its threads (nice 12 and 19 did not help).
SHA-256 is 0.55 of the write's 0.77 s a GB on one core, the copy into aligned memory 0.06, the system's part of O_DIRECT
0.02. Beside one other busy process a step takes seven times as long, for its threads wait for each other by spinning.

    python benchmarks/bench_checkpoint.py [--turns 7 3] [--size 10m 100m] [--steps 20] [--folder DIR]

On a busy machine `--steps 5` has more saves in the same time, and so less noise in what each adds.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_train import SIZES, model_config
from harness import THREADS, write_results

SIDES = ("none", "background", "at once")
EVERY = 20  # steps between two saves, which the cost is of
HAD = 0.9  # of the processors: with less, a block was disturbed


@dataclass
class Block:
    """Seconds: of standing still, of each step, of waiting at the end for a write that was slower; processor seconds of
    the steps and of the writing thread."""

    pause: float = 0.0
    steps: list[float] = field(default_factory=list)
    wait: float = 0.0
    busy: float = 0.0
    writing: float = 0.0

    @property
    def had(self) -> float:
        """The share of the processors that this process had in the steps."""
        return self.busy / (THREADS * sum(self.steps))

    @property
    def wall(self) -> float:
        return self.pause + sum(self.steps) + self.wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--turns", nargs="*", type=int, default=[7, 3], help="blocks of each side, for each size")
    parser.add_argument("--steps", type=int, default=EVERY, help="of a block")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    turns = [*options.turns, *options.turns[-1:] * len(options.size)]
    rows, raw = [], {}
    for size, count in zip(options.size, turns, strict=False):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            parameters, found = measure(size, count, options.steps, Path(folder))
        rows += table_rows(parameters, found)
        raw[size] = {side: [vars(block) for block in blocks] for side, blocks in found.items()}
    write_results("checkpoint", rows, raw)


def undisturbed(blocks: Sequence[Block]) -> list[Block]:
    return [block for block in blocks if block.had >= HAD]


def table_rows(parameters: int, every: Mapping[str, list[Block]]) -> list[dict[str, str]]:
    found = {side: undisturbed(blocks) or blocks for side, blocks in every.items()}
    left_out = sum(len(every[side]) - len(found[side]) for side in SIDES)

    def middle(side: str, name: str) -> float:
        return statistics.median(getattr(block, name) for block in found[side])

    def typical(side: str) -> float:
        steps = zip(*(block.steps for block in found[side]), strict=True)
        return middle(side, "pause") + middle(side, "wait") + sum(statistics.median(step) for step in steps)

    plain = [block.wall for block in found["none"]]
    quarters = statistics.quantiles(plain, n=4) if len(plain) > 1 else [0.0] * 3
    blocks = EVERY / len(found["none"][0].steps)  # in which one save is made
    rows = []
    for side in SIDES:
        pause = middle(side, "pause")
        bound = (middle(side, "writing") + pause * THREADS) / (blocks * middle("none", "busy"))
        rows.append({
            "parameters": f"{parameters / 1e6:.1f}M",
            "blocks": str(len(found[side])),
            "save": side,
            "pause, s": f"{pause:.3f}",
            "of one at once": f"{pause / middle('at once', 'pause'):.2f}",
            "block, s": f"{typical(side):.2f}",
            "cost": f"{(typical(side) / typical('none') - 1) / blocks:+.1%}",
            "bound": f"{bound:.1%}" if side == "background" else "",
            "noise": f"±{(quarters[2] - quarters[0]) / statistics.median(plain) / 2:.0%}, {left_out} left out",
        })  # fmt: skip
    return rows


def measure(size: str, turns: int, steps: int, folder: Path) -> tuple[int, dict[str, list[Block]]]:
    """(parameters, the blocks of each side)"""
    import torch

    from hanlin.core.runs import Run
    from hanlin.data.batch import Batch, document_positions, next_token_targets
    from hanlin.models import Transformer
    from hanlin.train import CausalLM, Trainer, TrainSettings
    from hanlin.train.keeper import Keeper

    _, _, vocabulary, length, _, _, _, rows = SIZES[size]

    class Source:
        rows_per_step, steps_per_epoch = rows, 0

        def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
            ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(step))
            documents = torch.zeros_like(ids)
            whole = Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents)
            return whole.rows(start, rows if stop is None else stop)

        def fingerprint(self) -> dict:
            return {}

    class TimedKeeper(Keeper):
        """Notes the processor seconds of the thread that writes."""

        writing = 0.0

        def _write(self, *arguments: Any) -> None:
            start = time.thread_time()
            super()._write(*arguments)
            if threading.current_thread() is not threading.main_thread():
                self.writing = time.thread_time() - start

    class TimedTrainer(Trainer):
        """Begins a block where a save is due, and saves there or does not. The first block of each side warms up."""

        keeper: TimedKeeper
        block, side, warm, since, busy = Block(), "none", False, 0.0, 0.0

        def _step(self, *arguments: Any) -> float | None:
            rate = super()._step(*arguments)
            now = time.perf_counter()
            self.block.steps.append(now - self.since)
            self.since = now
            return rate

        def _save(self, report: Any) -> None:
            self.end_block()
            number = self.state.step // steps - 1
            turn, place = divmod(number, len(SIDES))
            self.side = SIDES[(turn + place) % len(SIDES)]  # another order each turn
            if turn and all(len(undisturbed(blocks)) >= turns for blocks in found.values()):
                self.steps = self.state.step  # enough
            self.block, start = Block(), time.perf_counter()
            self.warm = turn > 0
            if self.side != "none":
                self.keeper._background = self.side == "background"
                super()._save(report)
            self.saved = self.state.step
            self.since = time.perf_counter()
            self.block.pause, self.busy = self.since - start, time.process_time()

        def end_block(self) -> None:
            block, start = self.block, time.perf_counter()
            block.busy = time.process_time() - self.busy
            self.keeper.finish()
            block.wait = time.perf_counter() - start
            block.writing = self.keeper.writing if self.side == "background" else 0.0
            if self.warm and len(block.steps) == steps:  # a run that was stopped ends in the middle of one
                found[self.side].append(block)
            told = f"{block.wall:.2f} s, pause {block.pause:.3f} s, had {block.had:.0%}"
            print(f"{size} step {self.state.step}: {self.side} {told}", file=sys.stderr)

    found: dict[str, list[Block]] = {side: [] for side in SIDES}
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = Transformer(model_config(size))
    blocks = 1 + (5 * turns + 1) * len(SIDES)  # the first before any
    settings = TrainSettings(
        steps=blocks * steps, batch_size=rows, lr=3e-4, precision="auto", log_every=10**9, save_every=steps,
        keep_last=1,
    )  # fmt: skip
    run = Run.open(folder)
    trainer = TimedTrainer(model, CausalLM(), Source(), settings, run=run, quiet=True)
    trainer.keeper = TimedKeeper(run, trainer.keeper._processes, keep_last=1, notice=print, background=True)
    trainer.fit()
    os.sync()
    return model.parameter_count(), found


if __name__ == "__main__":
    main()
