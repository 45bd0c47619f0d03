"""Settings that fit the recipe's types and yet could not act: each is refused by name before the first step."""

from collections.abc import Callable
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.core.runs import Run
from hanlin.data.batch import BatchSource
from hanlin.parallel.settings import Layout
from hanlin.train.settings import TrainSettings


def refuse_what_cannot_act(
    settings: TrainSettings,
    data: BatchSource,
    run: Run | None,
    evaluate: Callable[..., Any] | None,
    layout: Layout,
) -> None:
    """Raise `HanlinError` for the first setting that this run cannot honour. layout: fitted, `data` filled in."""
    if data.rows_per_step != settings.batch_size:
        raise HanlinError(
            f"train.batch_size is {settings.batch_size}, but the data gives {data.rows_per_step} rows a step; "
            "make the data with the same batch size."
        )
    replicas = layout.data or 1
    if settings.batch_size % replicas:
        raise HanlinError(
            f"train.batch_size {settings.batch_size} does not divide among {replicas} processes of the data axis."
        )
    if settings.micro_batch_size is not None and (settings.batch_size // replicas) % settings.micro_batch_size:
        raise HanlinError(
            f"Each of the {replicas} replicas has {settings.batch_size // replicas} rows a step, which is no multiple "
            f"of train.micro_batch_size {settings.micro_batch_size}."
        )
    if evaluate is None and settings.eval_every is not None:
        raise HanlinError(
            "train.eval_every is set, but there is nothing to evaluate on: give held-out data, or unset it."
        )
    if run is None and (settings.save_every is not None or settings.trackers or settings.keep_best):
        raise HanlinError("train.save_every, keep_best and trackers write files: they need a run folder.")
    if settings.spikes is not None and settings.spikes.action == "rollback" and settings.save_every is None:
        raise HanlinError("train.spikes goes back to checkpoints (rollback): set train.save_every, or let it skip.")
    if settings.mup_base_width is not None and settings.optimizer.kind != "adamw":
        raise HanlinError(
            f"train.mup_base_width gives factors for adamw; found the optimizer {settings.optimizer.kind}."
        )
    shared = layout.shard != "none" or layout.tensor > 1 or layout.expert > 1
    if shared and run is not None and getattr(settings.optimizer, "state_bits", 32) == 8:
        raise HanlinError(
            "train.optimizer.state_bits 8 counts in blocks of 256 numbers of what a rank holds; where ranks share a "
            "parameter (parallel.shard, tensor, expert) such a state cannot be cut anew. Take 32 there."
        )
    if layout.expert > 1 and run is not None and settings.optimizer.kind == "adafactor":
        raise HanlinError(
            "train.optimizer adafactor keeps rows and columns of whole stacks of experts; with parallel.expert such a "
            "state cannot be cut anew. Take adamw there."
        )
