"""`Trainer`: the one loop that learns. It knows objectives, batches by step, and nothing about what is being learnt.

One optimizer step:
    batch   = data.batch(step)                     a function of (seed, step)
    totals  = sum of objective.count(part)         over all micro-batches and ranks, before the first backward
    for part in micro-batches: step_loss(objective.loss(model, part), totals).backward()
    check finite → clip → optimizer at lr(step) → log → evaluate → checkpoint
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hanlin.core.runs import Run
from hanlin.data.batch import BatchSource
from hanlin.models.transformer import Transformer
from hanlin.train.objective import Objective
from hanlin.train.settings import TrainSettings

Evaluate = Callable[[Transformer, int], dict[str, float]]  # (model, step) -> {"eval/loss": ...}


@dataclass(frozen=True)
class TrainResult:
    """step: how many optimizer steps are done; finished: False if a signal ended the run early (it is saved)."""

    step: int
    finished: bool
    metrics: dict[str, Any]


class Trainer:
    """Trains `model` in place on `data` until `settings` says so; with a `run` it logs, checkpoints and resumes there."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        data: BatchSource,
        settings: TrainSettings,
        *,
        run: Run | None = None,
        seed: int = 0,
        evaluate: Evaluate | None = None,
        title: str = "train",
    ) -> None:
        raise NotImplementedError

    def fit(self) -> TrainResult:
        """Train to the end, from the newest checkpoint of `run` if there is one (bit-exact on CPU).

        SIGTERM and Ctrl-C save a checkpoint and return `finished=False`. A non-finite loss or gradient raises
        `HanlinError` with the step, the documents of the batch and the last good checkpoint.
        """
        raise NotImplementedError
