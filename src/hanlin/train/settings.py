"""The `train:` section of a recipe: everything the one loop can be told, and nothing else."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.core.errors import HanlinError
from hanlin.core.recipe import Section
from hanlin.train.choices import (
    SGD,
    WSD,
    Adafactor,
    AdamW,
    Average,
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    Muon,
    Offload,
    OptimizerChoice,
    Recompute,
    Restarts,
    ScheduleChoice,
)

__all__ = [
    "SGD", "WSD", "Adafactor", "AdamW", "BalanceByBias", "BalanceByLoss", "Constant", "Cosine", "InverseSqrt", "Linear",
    "LoopSettings", "Muon", "Restarts", "Spikes", "TrainSettings",
]  # fmt: skip


class BalanceByBias(Section):
    """Experts kept busy by the router's correction, moved by `rate` after each step (arXiv:2408.15664)."""

    kind: Literal["bias"] = "bias"
    rate: Annotated[float, Field(gt=0)] = 1e-3


class BalanceByLoss(Section):
    """Experts kept busy by a loss of this `weight` (arXiv:2101.03961)."""

    kind: Literal["loss"] = "loss"
    weight: Annotated[float, Field(gt=0)] = 1e-2


class Spikes(Section):
    """What to do when a step's loss or gradient jumps: more than `threshold` robust deviations above its median."""

    action: Annotated[
        Literal["skip", "rollback"],
        Field(description="skip: leave the step's rows out; rollback: go back to the newest checkpoint besides"),
    ] = "skip"
    window: Annotated[int, Field(ge=8, description="steps that the median is taken over")] = 64
    threshold: Annotated[float, Field(gt=0)] = 8.0
    before: Annotated[
        int, Field(ge=0, description="steps in front of a spike whose rows a rollback leaves out too")
    ] = 1
    most: Annotated[int, Field(gt=0, description="spikes in one run after which it stops with an error")] = 20


class LoopSettings(Section):
    """All but the length and the rate, which a recipe may leave to its objective. Sizes are rows (packed sequences of
    the data's length)."""

    batch_size: Annotated[int, Field(gt=0, description="rows of one optimizer step, over all ranks")] = 16
    micro_batch_size: Annotated[int | None, Field(gt=0, description="rows of one backward; None: all at once")] = None
    optimizer: Annotated[OptimizerChoice, Field(discriminator="kind")] = AdamW()
    schedule: Annotated[ScheduleChoice, Field(discriminator="kind")] = Cosine()
    clip: Annotated[float | None, Field(gt=0, description="largest global gradient norm; None: no clipping")] = 1.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "fp8"],
        Field(
            description="dtype of the activations over fp32 weights; auto: bf16 where a measurement finds it faster; "
            "fp16: with a dynamic loss scale; fp8: bf16 with matrix products in 8 bits (Hopper)"
        ),
    ] = "auto"
    tf32: Annotated[bool, Field(description="fp32 matrix products of a GPU in TF32")] = False
    recompute: Annotated[Recompute, Field(description="activations that backward makes again")] = Recompute()
    offload: Annotated[Offload | None, Field(description="activations that wait in the CPU's memory")] = None
    average: Annotated[Average | None, Field(description="an average of the weights (EMA), evaluated and saved")] = None
    mup_base_width: Annotated[
        int | None,
        Field(gt=0, description="muP: rates and initial weights found at this width carry over to this model"),
    ] = None
    z_loss: Annotated[float, Field(ge=0, description="weight of mean logsumexp(logits)^2 (PaLM; 1e-4)")] = 0.0
    balance: Annotated[BalanceByBias | BalanceByLoss | None, Field(description="of experts")] = None
    router_z_loss: Annotated[float, Field(ge=0, description="weight of the routers' z-loss (ST-MoE; 1e-3)")] = 0.0
    spikes: Spikes | None = None
    monitor_every: Annotated[
        int | None, Field(gt=0, description="steps between update-to-weight ratios and gradient norms by kind")
    ] = None
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: Annotated[int, Field(gt=0)] = 10
    eval_every: Annotated[int | None, Field(gt=0)] = None
    save_every: Annotated[int | None, Field(gt=0, description="steps between checkpoints; None: only at the end")] = (
        None
    )
    keep_last: Annotated[int, Field(gt=0, description="checkpoints kept")] = 2
    keep_best: Annotated[bool, Field(description="keep the checkpoint with the lowest eval/loss besides")] = False
    background: Annotated[bool, Field(description="write checkpoints while training goes on")] = True
    trackers: Annotated[
        list[Literal["tensorboard", "trackio", "wandb", "mlflow"]],
        Field(default_factory=list, description="write these files into the run folder, too; each is an extra"),
    ]
    trackers_online: Annotated[bool, Field(description="let the trackers contact their hosts")] = False

    @model_validator(mode="after")
    def _fitting(self) -> "LoopSettings":
        if self.keep_best and self.eval_every is None:
            raise ValueError("keep_best needs eval_every: without evaluation no checkpoint is the best")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class TrainSettings(LoopSettings):
    """How long, how fast, how often: what the loop needs, complete."""

    steps: Annotated[int | None, Field(gt=0, description="optimizer steps; give this or epochs")] = None
    epochs: Annotated[float | None, Field(gt=0, description="passes over the data; give this or steps")] = None
    lr: Annotated[float, Field(gt=0)] = 1e-3

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        return self

    def planned_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run. steps_per_epoch: of the data; 0 if it is endless: then `epochs` is
        refused."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        if steps_per_epoch == 0:
            raise HanlinError("train.epochs is given, but this data has no end. Give train.steps instead.")
        return max(1, round(self.epochs * steps_per_epoch))
