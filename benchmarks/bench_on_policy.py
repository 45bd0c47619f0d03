"""Does every on-policy algorithm raise the accuracy on problems that it never saw?

One small model, made by the quickstart and taught a little arithmetic, so that a fifth to three fifths of its sampled
answers are right; then each algorithm from there, on sums whose pairs of numbers stand in no held-out problem. Judged
to the letter: four sampled answers and the greedy one to each of 400 held-out problems, before the first step and
after the last.

    python benchmarks/bench_on_policy.py [--quickstart runs/quickstart] [--folder runs/on-policy] [--quick]

Finished runs are not done again, a cut one goes on: the same command continues after a stop. Two cores, at most five
minutes a run, 75 in total; --quick: few steps of each, which shows that everything runs and nothing else.

What the rates are: this model learnt with Muon and is sensitive. AdamW at 1.2e-4 halved the reward of the first round
in one step; 2e-5 lets it rise.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from hanlin.align.problems import write_problems
from hanlin.core.metrics import read_metrics
from harness import machine, write_results

LARGEST, TRAIN, HELD_OUT = 60, 6000, 400
RUNS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # algorithm -> (seeds, objective, train)
    "grpo": (3, {"beta": 0.0}, {}),
    "dapo": (1, {}, {}),
    "rloo": (1, {"beta": 0.0}, {}),
    "remax": (1, {"beta": 0.0}, {}),
    "reinforce_pp": (1, {"beta": 0.0}, {}),
    "ppo": (3, {"beta": 0.01}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quickstart", type=Path, default=Path("runs/quickstart"), help="folder of `hanlin quickstart`"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/on-policy"))
    parser.add_argument("--steps", type=int, default=300, help="rounds of 128 answers")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    steps = 4 if options.quick else options.steps
    base = prepare(options.quickstart / "7-sft" / "model", options.folder)
    rows = []
    for name in options.only:
        seeds, objective, train = RUNS[name]
        for seed in range(1 if options.quick else seeds):
            rows.append(learn(options.folder, base, name, seed, objective, {"lr": options.lr, "steps": steps} | train))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if not options.quick:
        write_results("on_policy", rows, raw={"machine": machine(), "steps": steps, "lr": options.lr})


def prepare(model: Path, folder: Path) -> Path:
    """Problems, and a model that answers some of them."""
    problems = folder / "problems"
    if not (problems / "held-out.jsonl").exists():
        write_problems(problems, "sum", train=TRAIN, held_out=HELD_OUT, largest=LARGEST)
        rows = [json.loads(line) for line in (problems / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        chats = [{"instruction": row["prompt"], "output": row["answer"]} for row in rows]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chats)
        (problems / "taught.jsonl").write_text(lines, encoding="utf-8")
    hanlin(folder, {
        "name": "base", "runs": str(folder), "model": {"kind": "saved", "path": str(model)},
        "objective": {"kind": "sft", "files": [str(problems / "taught.jsonl")], "seq_len": 256},
        "train": {"steps": 200, "lr": 3e-3, "batch_size": 8, "optimizer": {"kind": "muon"}, "device": "cpu"},
    })  # fmt: skip
    return folder / "base" / "model"


def learn(
    folder: Path, base: Path, algorithm: str, seed: int, objective: dict[str, Any], train: dict[str, Any]
) -> dict[str, Any]:
    """One run, and what came of it."""
    name, start = f"{algorithm}-{seed}", time.perf_counter()
    problems = folder / "problems"
    hanlin(folder, {
        "name": name, "runs": str(folder), "seed": seed, "model": {"kind": "saved", "path": str(base)},
        "objective": {
            "kind": algorithm, "prompts": [str(problems / "train.jsonl")],
            "held_out": [str(problems / "held-out.jsonl")], "held_out_rows": HELD_OUT,
            "rewards": [{"kind": "exact"}], "max_tokens": 8, **objective,
        },
        "train": {
            "schedule": {"kind": "constant"}, "log_every": 5, "save_every": 25, "device": "cpu",
            "eval_every": max(1, train["steps"] // 4), **train,
        },
    })  # fmt: skip
    rows = read_metrics(folder / name / "metrics.jsonl")
    judged = [row for row in rows if "eval/sampled" in row]
    learnt = [row for row in rows if "reward" in row]
    first, last, seconds = judged[0], judged[-1], rows[-1]["time"]
    found = {
        "algorithm": algorithm, "seed": seed, "steps": learnt[-1]["step"], "seconds": round(seconds, 1),
        "sampled_before": first["eval/sampled"], "sampled_after": last["eval/sampled"],
        "greedy_before": first["eval/greedy"], "greedy_after": last["eval/greedy"],
        "completions_per_s": round(128 * learnt[-1]["step"] / seconds, 1),
        "tokens_per_s": round(learnt[-1]["tokens"] / seconds),
        "waited": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    if algorithm == "ppo":
        found["explained_variance"] = round(mean(row["explained_variance"] for row in learnt[-10:]), 3)
    return found


def hanlin(folder: Path, recipe: dict[str, Any]) -> None:
    """`hanlin train`, unless the run is finished."""
    if (folder / recipe["name"] / "model" / "config.json").exists():
        return
    file = folder / f"{recipe['name']}.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "hanlin", "train", str(file), "--quiet"], check=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds."""
    lines = [
        "| algorithm | seeds | sampled before | after | greedy before | after | seconds | answers/s | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        own = [row for row in rows if row["algorithm"] == name]
        cells = [
            f"{mean(row[key] for row in own):.1%}"
            for key in ("sampled_before", "sampled_after", "greedy_before", "greedy_after")
        ]
        speeds = [f"{mean(row[key] for row in own):.0f}" for key in ("seconds", "completions_per_s", "tokens_per_s")]
        lines.append("| " + " | ".join([name, str(len(own)), *cells, *speeds]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
