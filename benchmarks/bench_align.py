"""Alignment with LoRA beside TRL 1.16 + peft: SFT, DPO and GRPO on the same random Llama (~30M), on two cores.

Both sides read one model folder, one tokenizer and the same rows (`align_work`), train rank 16 on all linear layers in
bf16 over fp32 weights and are timed alike: a process each, medians of the steps after two, peak memory of the process.
Hanlin is what `hanlin train` does with a recipe that leaves everything open (`align_hanlin`), TRL its own trainer
(`align_trl`), "as shipped" (its defaults: batch 8, bf16, gradient checkpointing) and at the best of the settings
below, each of which is tried once before the sides take turns. Units:

    sft    tokens/s   that a conversation has, padding not counted (of them about two thirds are trained)
    dpo    pairs/s
    grpo   completions/s, whole steps: 64 tokens each (end token ignored), and lengths that are geometric, mean ~26

GRPO has 8 answers to a prompt on both sides; Hanlin's round is 16 prompts (its default), TRL's 1 as shipped, 16 at its
best. TRL's packed rows on a CPU are one long row whose documents see each other: a speed, not the same training.

What the profiles taught (one thread, CPU seconds, which other processes disturb less than the clock):
- GRPO at 32 answers of 64 tokens: learning 2.1 s, writing 1.8 s with packed bf16 weights and 4.4 s with the shared
  fp32 ones. The copy costs 0.6 s a round whatever its size, so packed weights win from rounds of about ten answers.
- Of learning, matrix products are 40 %, attention 15 % and the sums of LoRA's branches, forward and backward, as much:
  each branch adds to an output and to a gradient that already stand in memory. One autograd function that adds inside
  the product (addmm) makes a layer with its branch 1.25 to 1.35 times as fast.
- DPO: the reference, which is the adapter switched off, costs a quarter of the step and no memory.
- A whole round at once (128 answers) is the peak of the memory; `train.micro_batch_size` cuts it.

    python benchmarks/bench_align.py --peer-python ENVIRONMENT/bin/python [--runs 3] [--task sft dpo grpo] [--quick]

The environment of the other side: pip install torch==2.13.0, then trl==1.16.0 peft==0.21.2 transformers==5.23.0
datasets accelerate. --quick: few steps, few candidates, rounds of 4 prompts, one run of each, nothing written.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import harness
from align_work import prepare

HERE = Path(__file__).parent
PLAIN = {"gradient_checkpointing": False}
UNITS = {"sft": "tokens/s", "dpo": "pairs/s", "grpo": "completions/s"}
WANTED = {"sft": (2.0, 1.5), "dpo": (2.0, 1.5), "grpo": (5.0, 3.0)}  # times TRL as shipped, and at its best


def batch(rows: int, **more: Any) -> dict[str, Any]:
    """TRL's options: without checkpointing, so many rows a step."""
    return {**PLAIN, "per_device_train_batch_size": rows, **more}


CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {  # for TRL's best
    "sft": {"batch 4": batch(4), "batch 8": batch(8), "batch 16": batch(16), "packed, batch 8": batch(8, packing=True)},
    "dpo": {"batch 2": batch(2), "batch 4": batch(4), "batch 8": batch(8), "batch 16": batch(16)},
    "grpo": {
        "batch 64": batch(64),
        "batch 128": batch(128),
        "batch 128 in 16s": batch(16, gradient_accumulation_steps=8),
    },
}
QUICK = {"sft": {"batch 8": batch(8)}, "dpo": {"batch 8": batch(8)}, "grpo": {"batch 32": batch(32)}}
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {"packed": {}},
    "dpo": {"packed": {}},
    "grpo": {"shared weights": {"weights": "shared"}, "packed weights": {"weights": "packed"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has trl")
    parser.add_argument("--folder", type=Path, default=Path("runs/align-speed"), help="model and texts, made once")
    parser.add_argument("--task", nargs="*", choices=list(UNITS), default=list(UNITS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.steps = 1, 2
    expect_peer(options.peer_python)
    prepare(options.folder)
    rows, raw = [], {}
    for task in options.task:
        for kind in ("fixed", "ragged") if task == "grpo" else ("",):
            found, raw[f"{task} {kind}".strip()] = compare(task, kind, options)
            rows += found
    if options.quick:
        print(harness.table(rows))
    else:
        harness.write_results("align", rows, raw)


def expect_peer(python: str) -> None:
    """Stop with what is missing in the other side's environment."""
    needed = "trl", "peft", "datasets", "accelerate", "transformers", "torch"
    probe = f"from importlib.metadata import version\nfor name in {needed}: print(name, version(name))"
    if shutil.which(python) is None:
        raise SystemExit(f"--peer-python names {python}, which is no program.")
    done = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{python} cannot run TRL: {(done.stderr.strip().splitlines() or ['it does not start'])[-1]}\nMake an "
            "environment (pip install torch==2.13.0, then trl==1.16.0 peft datasets accelerate) and name its "
            "interpreter with --peer-python."
        )
    print(done.stdout.replace("\n", "  "), file=sys.stderr)


def compare(task: str, kind: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and what every process said."""
    fixed = {"fixed": kind == "fixed"} if task == "grpo" else {}

    def peer(choice: dict[str, Any]) -> list[str]:
        return [options.peer_python, str(HERE / "align_trl.py"), task, str(options.folder), json.dumps(choice | fixed),
                str(options.steps), str(options.threads)]  # fmt: skip

    def ours(choice: dict[str, Any]) -> list[str]:
        return [sys.executable, str(HERE / "align_hanlin.py"), task, str(options.folder), json.dumps(choice | fixed),
                str(options.steps), str(options.threads)]  # fmt: skip

    print(f"{task} {kind}", file=sys.stderr)
    candidates = QUICK[task] if options.quick else CANDIDATES[task]
    small = {"prompts_a_round": 4} if task == "grpo" and options.quick else {}
    tried = harness.interleave({n: peer(c) for n, c in candidates.items()}, runs=1, retries=retries(options))
    best = max(tried, key=lambda name: harness.median(tried[name]))
    shipped, best_name = "TRL as shipped", f"TRL at its best ({best})"
    sides = {f"Hanlin, {name}": ours(choice | small) for name, choice in OURS[task].items()}
    sides |= {shipped: peer({}), best_name: peer(candidates[best])}
    results = harness.interleave(sides, runs=options.runs, retries=retries(options))
    speeds = {name: harness.median(runs) for name, runs in results.items()}
    rows = []
    for name, runs in results.items():
        own = name.startswith("Hanlin")
        rows.append({
            "task": f"{task} {kind}".strip(),
            "side": name,
            "speed": f"{speeds[name]:,.1f} {UNITS[task]}",
            "spread": f"{min(r['value'] for r in runs):,.1f}–{max(r['value'] for r in runs):,.1f}",
            "times TRL as shipped": f"{speeds[name] / speeds[shipped]:.2f}" if own else "",
            "times its best": f"{speeds[name] / speeds[best_name]:.2f}" if own else "",
            "wanted": " / ".join(f"{x:g}" for x in WANTED[task]) if own else "",
            "answer length": f"{harness.median(runs, 'length'):.1f}" if task == "grpo" else "",
            "CPU seconds a step": f"{harness.median(runs, 'cpu_seconds'):.2f}",
            "peak memory": f"{max(r['memory_gib'] for r in runs):.2f} GiB",
        })  # fmt: skip
    return rows, {"tried": tried, "sides": results}


def retries(options: argparse.Namespace) -> int:
    return 0 if options.quick else 2


if __name__ == "__main__":
    main()
