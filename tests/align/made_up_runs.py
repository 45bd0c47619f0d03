"""Curves of alignment runs that never were: healthy noisy ones, and each with one thing gone wrong."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from hanlin.core.metrics import MetricsFile
from hanlin.core.runs import Run

Change = Callable[[int, dict[str, Any], random.Random], None]  # (row number, row, chance)


def on_policy_rows(seed: int = 0, count: int = 200, change: Change | None = None, every: int = 10) -> Iterator[dict]:
    """A GRPO run that learns: lines of training and, every so many steps, of evaluation. `change` alters a line."""
    chance = random.Random(seed)
    start, end = chance.uniform(0.2, 0.6), chance.uniform(0.75, 0.95)
    speed, wobble = chance.uniform(15, 80), chance.uniform(0.02, 0.08)
    spread = chance.uniform(0.1, 0.4)
    for step in range(count + 1):
        right = end - (end - start) * 2.718 ** (-step / speed)
        length = 12 + 6 * right
        if step:
            reward = _share(right + chance.gauss(0, wobble))
            row = {
                "step": step, "time": 2.0 * step, "tokens": 1500 * step, "loss": chance.gauss(0, 0.02), "lr": 1e-4,
                "grad_norm": 0.4 * chance.lognormvariate(0, spread), "tokens_per_s": chance.gauss(900, 80), "mfu": 0.1,
                "reward": reward, "reward/std": 0.4, "reward/number": reward, "reward/overlong": -0.01,
                "groups/silent": _share(0.15 + 0.4 * (right - start) + chance.gauss(0, 0.1)),
                "answer/length": length * chance.lognormvariate(0, 0.08), "answer/length_p95": 2 * length,
                "answer/truncated": (cut := _share(chance.gauss(0.05, 0.04))), "answer/ended": 1 - cut,
                "answer/empty": 0.0,
                "entropy": (0.3 + 0.9 * 2.718 ** (-step / 120)) * chance.lognormvariate(0, 0.15),
                "kl/k1": 0.002 * step**0.5 * chance.lognormvariate(0, 0.3), "kl/k3": 0.002 * step**0.5,
                "clip_low": 0.0, "clip_high": 0.0, "ratio": 1.0, "rollout/mismatch": 1e-3,
                "rollout/mismatch_p95": 4e-3 * chance.lognormvariate(0, 0.5),
                "explained_variance": min(0.9, step / 40) - 0.1 + chance.gauss(0, 0.1), "value_loss": 0.1,
                "seconds/rollout": chance.gauss(1.1, 0.1), "seconds/reward": 0.05, "seconds/logprobs": 0.2,
                "seconds/refresh": 0.02,
            }  # fmt: skip
            if change:
                change(step, row, chance)
            yield row
        if step % every == 0:
            row = {
                "step": step, "time": 2.0 * step, "tokens": 1500 * step,
                "eval/sampled": _share(right + chance.gauss(0, 0.02)),
                "eval/greedy": _share(right + 0.05 + chance.gauss(0, 0.03)), "eval/length": length,
                "eval_text/loss": 2.0 + 0.0002 * step,
            }  # fmt: skip
            if change:
                change(step, row, chance)
            yield row


def preference_rows(seed: int = 0, count: int = 100, change: Change | None = None) -> Iterator[dict]:
    """A DPO run that learns."""
    chance = random.Random(seed)
    for step in range(1, count + 1):
        grown = 1 - 2.718 ** (-step / 40)
        chosen, rejected = 0.4 * grown + chance.gauss(0, 0.05), -1.2 * grown + chance.gauss(0, 0.08)
        row = {
            "step": step, "time": 1.0 * step, "tokens": 900 * step, "loss": 0.69 - 0.3 * grown,
            "grad_norm": chance.lognormvariate(0, 0.3), "tokens_per_s": 1000.0,
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margin": chosen - rejected,
            "rewards/accuracy": _share(0.5 + 0.35 * grown + chance.gauss(0, 0.08)),
            "logps/chosen": -60 + 4 * grown + chance.gauss(0, 8), "logps/rejected": -60 - 9 * grown,
        }  # fmt: skip
        if change:
            change(step, row, chance)
        yield row
        if step % 10 == 0:
            row = {"step": step, "eval/loss": 0.69 - 0.2 * grown + chance.gauss(0, 0.01)}
            if change:
                change(step, row, chance)
            yield row


def write_run(folder: Path, rows: list[dict], *, rounds: int = 12, kind: str = "grpo") -> Run:
    """A run folder of these lines, with samples."""
    run = Run.open(folder)
    recipe = {"name": folder.name, "objective": {"kind": kind}, "train": {"lr": 1e-4, "steps": 200}}
    run.recipe.write_text(yaml.safe_dump(recipe))
    file = MetricsFile(run.metrics)
    for row in rows:
        file.write(row)
    file.close()
    write_samples(folder / "samples.jsonl", rounds)
    return run


def write_samples(file: Path, rounds: int, *, first: int = 0) -> None:
    with file.open("a", encoding="utf-8") as stream:
        for number in range(first, first + rounds):
            for place in range(3):
                right = (number * 7 + place * 3) % 12 < number
                row = {
                    "round": number, "prompt": f"What is {number + 2} + {place + 5}? | 几？",
                    "answer": f"**{number + place + 7}**" if right else "<b>no</b>\nidea", "finish": "stop",
                    "score": float(right), "advantage": 0.7 if right else -0.7, "tokens": 4,
                }  # fmt: skip
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))
