"""Hanlin's side of `bench_align.py`: what `hanlin train` does with a recipe, its steps timed by its own metrics.

    python align_hanlin.py TASK FOLDER '{"weights": "packed", ...}' STEPS THREADS

The options go to the recipe's objective. The last line is the result in JSON.
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

WARM = 2  # steps before the clock counts


def main() -> None:
    task, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    steps, threads = map(int, sys.argv[4:6])
    import torch

    torch.set_num_threads(threads)
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as runs:
        found = measured(task, folder, options, steps + WARM, Path(runs))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    from harness import calibrate

    print(json.dumps({**found, "memory_gib": memory, "calibration": calibrate()}))


def recipe_of(task: str, folder: Path, options: dict[str, Any], steps: int, runs: Path) -> Any:
    """LoRA on everything, a rate that changes nothing; the rest as the library leaves it."""
    from align_work import ANSWER, ROW
    from hanlin.align.recipe import TrainRecipe

    file = str(folder / f"{task}.jsonl")
    objective: dict[str, Any] = {
        "sft": {"kind": "sft", "files": [file], "seq_len": ROW},
        "dpo": {"kind": "dpo", "files": [file], "seq_len": ROW, "overlong": "cut"},
        "grpo": {
            "kind": "grpo", "prompts": [file], "plain": True, "beta": 0.0, "max_tokens": ANSWER, "answers": 8,
            "rewards": [{"kind": "function", "function": "align_work:reward"}],
        },
    }[task]  # fmt: skip
    train = {"steps": steps, "lr": 1e-12, "log_every": 1, "device": "cpu"} | options.pop("train", {})
    if task != "grpo":
        train = {"batch_size": 8} | train
    return TrainRecipe.model_validate({
        "name": "side", "runs": str(runs), "model": {"kind": "saved", "path": str(folder / "model")},
        "adapter": {"rank": 16, "alpha": 32}, "objective": objective | options, "train": train,
    })  # fmt: skip


def measured(task: str, folder: Path, options: dict[str, Any], steps: int, runs: Path) -> dict[str, Any]:
    """The steps of `align.build.train`, with the batches counted and, where it is asked for, the end token ignored."""
    from hanlin.align.build import build_model, resolve_settings
    from hanlin.align.method import Parts
    from hanlin.align.methods import method_of, open_data
    from hanlin.align.sources import open_tokenizer
    from hanlin.core.runs import Run
    from hanlin.core.seeds import seed_everything
    from hanlin.train import Trainer

    fixed = options.pop("fixed", False)
    recipe = recipe_of(task, folder, options, steps, runs)
    seed_everything(recipe.seed)
    tokenizer = open_tokenizer(recipe)
    data = open_data(recipe, tokenizer)
    settings, _ = resolve_settings(recipe, data)
    model, run = build_model(recipe, tokenizer, data.seq_len), Run.open(recipe.out)
    wiring = method_of(recipe).wire(Parts(recipe, tokenizer, data, settings, model, run))
    if fixed:
        asking = wiring.source.asking
        wiring.source.asking = replace(asking, params=replace(asking.params, ignore_eos=True))
    counted = count_batches(wiring.source)
    rows: list[Any] = []

    def watch(row: Any) -> list[str]:
        rows.append({**row, "ended": time.perf_counter(), "cpu": time.process_time()})
        return []

    trainer = Trainer(
        model, wiring.objective, wiring.source, settings, run=run, seed=recipe.seed, watch=watch, quiet=True
    )
    trainer.fit()
    wiring.close()
    seconds = {now["step"]: now["ended"] - before["ended"] for before, now in pairwise(rows)}
    busy = {now["step"]: now["cpu"] - before["cpu"] for before, now in pairwise(rows)}
    timed = [step for step in seconds if step > WARM]
    part = {"sft": "tokens", "dpo": "pairs", "grpo": "answers"}[task]
    of_all = {name: sum(counted[step - 1][name] for step in timed) for name in counted[0]}
    found = {
        "value": statistics.median(counted[step - 1][part] / seconds[step] for step in timed),
        "step_seconds": statistics.median(seconds[step] for step in timed),
        "cpu_seconds": statistics.median(busy[step] for step in timed),
        "steps": len(timed),
        "trained_share": of_all["trained"] / of_all["tokens"],
        "padding": 1 - of_all["tokens"] / of_all["numbers"],
        "precision": str(trainer.precision.compute_dtype),
    }
    if task == "grpo":
        found["length"] = of_all["trained"] / of_all["answers"]
    kept = [row for row in rows if row["step"] in timed]
    stages = [name for name in kept[0] if name.startswith("seconds/")]
    return found | {name: statistics.median(row[name] for row in kept) for name in stages}


def count_batches(source: Any) -> dict[int, dict[str, int]]:
    """By number of the step, what its batch held; filled while it trains."""
    from hanlin.nn.losses import IGNORE

    make, counted = source.batch, {}

    def batch(step: int, start: int = 0, stop: int | None = None) -> Any:
        made = make(step, start, stop)
        answers = int((made.documents.amax(1) + 1).sum())
        counted[step] = {
            "tokens": int((made.documents >= 0).sum()), "trained": int((made.targets != IGNORE).sum()),
            "numbers": made.ids.numel(), "answers": answers, "pairs": answers // 2,
        }  # fmt: skip
        return made

    source.batch = batch
    return counted


if __name__ == "__main__":
    main()
