"""Numbers of a round of answers: what is logged of them, scores put together and picked out, sums over all ranks."""

import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from hanlin.align.rewards import Scores
from hanlin.align.samples import Sample
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.parallel.processes import over_all
from hanlin.rl.advantages import moments


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def answer_notes(samples: list[Sample], scores: Scores) -> dict[str, tuple[float, float]]:
    n, lengths = float(len(samples)), sorted(s.length for s in samples)
    notes = {
        "reward": (sum(scores.total), n),
        "reward/std": (float(torch.tensor(scores.total).std()) if len(samples) > 1 else 0.0, 1.0),
        "answer/length": (float(sum(lengths)), n),
        "answer/length_p95": (float(lengths[int(0.95 * (len(lengths) - 1))]), 1.0),
        "answer/truncated": (float(sum(s.finish == "length" for s in samples)), n),
        "answer/ended": (float(sum(s.finish == "stop" for s in samples)), n),
        "answer/empty": (float(sum(s.length == 0 for s in samples)), n),
    }
    for name, values in scores.by_name.items():
        said = [value for value in values if value is not None]
        notes[f"reward/{name}"] = (sum(said), float(len(said)))
    return notes


def joined_scores(a: Scores, b: Scores) -> Scores:
    if not a.total:
        return b
    steps = None if a.steps is None or b.steps is None else a.steps + b.steps
    ends = None if a.ends is None or b.ends is None else a.ends + b.ends
    return Scores(a.total + b.total, {name: a.by_name[name] + b.by_name[name] for name in a.by_name}, steps, ends)


def chosen_scores(scores: Scores, order: list[int]) -> Scores:
    steps = None if scores.steps is None else [scores.steps[i] for i in order]
    by_name = {name: [values[i] for i in order] for name, values in scores.by_name.items()}
    ends = None if scores.ends is None else [scores.ends[i] for i in order]
    return Scores([scores.total[i] for i in order], by_name, steps, ends)


def of_written(sample: Sample, values: Sequence[float]) -> list[float]:
    return [float(value) for value, written in zip(values, sample.written, strict=True) if written]


def padded(rows: list[list[float]], most: int) -> Tensor:
    return torch.tensor([[*row, *[0.0] * (most - len(row))] for row in rows], dtype=torch.float64)


def step_rewards(samples: list[Sample], scores: Scores) -> tuple[list[list[float]], list[list[int]]] | None:
    """Rewards of steps, and the written tokens at which each ends, as the reward says; else the steps are even."""
    if scores.steps is None:
        return None
    ends = scores.ends or [
        [max(0, round(sample.length * (i + 1) / len(steps)) - 1) for i in range(len(steps))]
        for sample, steps in zip(samples, scores.steps, strict=True)
    ]
    return scores.steps, ends


def moments_of_all(values: Tensor) -> Tensor:
    """Count, sum and sum of squares over all ranks."""
    return over_all(moments(values))


def most_of_all(count: int) -> int:
    """Over all ranks: they draw from the same list of prompts and must agree."""
    return int(over_all(torch.tensor(count), dist.ReduceOp.MAX))


def mean_of_all(total: float, count: int) -> float:
    """total / count, both summed over all ranks."""
    found = over_all(torch.tensor([total, float(count)], dtype=torch.float64))
    return float(found[0] / found[1].clamp_min(1))


def narrowed(batch: SequenceBatch, width: int) -> SequenceBatch:
    return replace(
        batch, ids=batch.ids[:, :width], targets=batch.targets[:, :width], positions=batch.positions[:, :width],
        documents=batch.documents[:, :width],
    )  # fmt: skip
