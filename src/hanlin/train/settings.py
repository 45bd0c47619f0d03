"""The `train:` section of a recipe: everything the one loop can be told, and nothing else."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.core.errors import HanlinError
from hanlin.core.recipe import Section


class AdamW(Section):
    """AdamW (arXiv:1711.05101). Matrices decay; norms, biases and, unless asked for, embeddings do not."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = False


class Muon(Section):
    """Muon (Jordan 2024; arXiv:2502.16982) for the layers' matrices, AdamW for embeddings, head, norms and biases.

    `train.lr` is the matrices' rate; adam_lr_ratio times it is AdamW's.
    """

    kind: Literal["muon"] = "muon"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    nesterov: bool = True
    iterations: Annotated[int, Field(ge=1)] = 5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_lr_ratio: Annotated[float, Field(gt=0)] = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8


class Cosine(Section):
    """Warm-up, then half a cosine down to `floor` times the peak (arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1, description="share of all steps")] = 0.02
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1


class WSD(Section):
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395): constant until the last `decay` share, then linear to
    `floor`."""

    kind: Literal["wsd"] = "wsd"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.02
    decay: Annotated[float, Field(ge=0, le=1)] = 0.3
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _fits(self) -> "WSD":
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together are more than the whole run")
        return self


class Constant(Section):
    """Warm-up, then constant."""

    kind: Literal["constant"] = "constant"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.0


class LoopSettings(Section):
    """All but the length and the rate, which a recipe may leave to its objective. Sizes are rows (packed sequences of
    the data's length)."""

    batch_size: Annotated[int, Field(gt=0, description="rows of one optimizer step, over all ranks")] = 16
    micro_batch_size: Annotated[int | None, Field(gt=0, description="rows of one backward; None: all at once")] = None
    optimizer: Annotated[AdamW | Muon, Field(discriminator="kind")] = AdamW()
    schedule: Annotated[Cosine | WSD | Constant, Field(discriminator="kind")] = Cosine()
    clip: Annotated[float | None, Field(gt=0, description="largest global gradient norm; None: no clipping")] = 1.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        Field(description="dtype of the activations over fp32 weights; auto: bf16 where a measurement finds it faster"),
    ] = "auto"
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: Annotated[int, Field(gt=0)] = 10
    eval_every: Annotated[int | None, Field(gt=0)] = None
    save_every: Annotated[int | None, Field(gt=0, description="steps between checkpoints; None: only at the end")] = (
        None
    )
    keep_last: Annotated[int, Field(gt=0, description="checkpoints kept")] = 2
    keep_best: Annotated[bool, Field(description="keep the checkpoint with the lowest eval/loss besides")] = False
    tensorboard: Annotated[bool, Field(description="write TensorBoard files too (extra: track)")] = False

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
