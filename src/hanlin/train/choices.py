"""What a recipe may choose in `train:`: optimisers, learning-rate schedules, recompute, offload, averages of weights.

Each is a section with a `kind` where there are several. What they do stands in `optim`, `muon`, `adafactor`,
`eight_bit`, `schedule`, `recompute`, `offload` and `ema`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.core.recipe import Section

Share = Annotated[float, Field(ge=0, le=1)]
WarmUp = Annotated[float, Field(ge=0, le=1, description="share of all steps")]
Floor = Annotated[float, Field(ge=0, le=1, description="the last rate, as a share of the peak")]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
StateBits = Annotated[
    Literal[32, 8], Field(description="8: the moments of matrices and head in blocks of 256 codes (arXiv:2110.02861)")
]
EmbeddingRatio = Annotated[float, Field(gt=0, description="rate of the embeddings over that of the other weights")]


class AdamW(Section):
    """AdamW (arXiv:1711.05101). Matrices decay; norms, biases and, unless asked for, embeddings do not."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Decay = 0.1
    decay_embeddings: bool = False
    embedding_lr_ratio: EmbeddingRatio = 1.0
    state_bits: StateBits = 32


class Muon(Section):
    """Muon (Jordan 2024; arXiv:2502.16982) for the layers' matrices, AdamW for embeddings, head, norms and biases.

    `train.lr` is the matrices' rate; adam_lr_ratio times it is AdamW's. state_bits 8: the momentum of matrices alone.
    """

    kind: Literal["muon"] = "muon"
    momentum: Momentum = 0.95
    nesterov: bool = True
    iterations: Annotated[int, Field(ge=1)] = 5
    weight_decay: Decay = 0.0
    adam_lr_ratio: Positive = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Positive = 1e-8
    embedding_lr_ratio: EmbeddingRatio = 1.0
    state_bits: StateBits = 32


class SGD(Section):
    """Gradient descent with heavy-ball or Nesterov momentum. The decay joins the gradient, as is usual for SGD."""

    kind: Literal["sgd"] = "sgd"
    momentum: Momentum = 0.9
    nesterov: bool = False
    weight_decay: Decay = 0.0
    decay_embeddings: bool = False
    embedding_lr_ratio: EmbeddingRatio = 1.0

    @model_validator(mode="after")
    def _acts(self) -> "SGD":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the momentum: set momentum above 0, or leave nesterov out")
        return self


class Adafactor(Section):
    """Adafactor (arXiv:1804.04235): a matrix's second moments as one row and one column.

    scale_by_weights: the rate is relative to each tensor's own root mean square, at least eps[1] (the paper's section
    8); momentum: the paper's beta_1, 0 for none, which is what saves the memory.
    """

    kind: Literal["adafactor"] = "adafactor"
    decay_power: Annotated[float, Field(gt=0, description="beta_2 at step t is 1 - t^-power")] = 0.8
    clip: Annotated[float, Field(gt=0, description="largest root mean square of an update")] = 1.0
    eps: tuple[Positive, Positive] = (1e-30, 1e-3)
    scale_by_weights: bool = True
    momentum: Momentum = 0.0
    weight_decay: Decay = 0.0
    decay_embeddings: bool = False
    embedding_lr_ratio: EmbeddingRatio = 1.0


OptimizerChoice = AdamW | Muon | SGD | Adafactor


class Constant(Section):
    """Warm-up, then constant."""

    kind: Literal["constant"] = "constant"
    warmup: WarmUp = 0.0


class Linear(Section):
    """Warm-up, then straight down to `floor` times the peak."""

    kind: Literal["linear"] = "linear"
    warmup: WarmUp = 0.02
    floor: Floor = 0.0


class Cosine(Section):
    """Warm-up, then half a cosine down to `floor` times the peak (arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    warmup: WarmUp = 0.02
    floor: Floor = 0.1


class Restarts(Section):
    """Warm-up, then `cycles` half cosines, each from the peak to `floor` and `growth` times as long as the one before
    (SGDR, arXiv:1608.03983)."""

    kind: Literal["restarts"] = "restarts"
    warmup: WarmUp = 0.02
    floor: Floor = 0.0
    cycles: Annotated[int, Field(ge=1)] = 4
    growth: Annotated[float, Field(ge=1)] = 1.0


class WSD(Section):
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395): constant until the last `decay` share, then linear to
    `floor`."""

    kind: Literal["wsd"] = "wsd"
    warmup: WarmUp = 0.02
    decay: Share = 0.3
    floor: Floor = 0.0

    @model_validator(mode="after")
    def _fits(self) -> "WSD":
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together are more than the whole run")
        return self


class InverseSqrt(Section):
    """Warm-up, then as the inverse square root of the steps made (arXiv:1706.03762, section 5.3).

    timescale: steps over which the rate falls to 1 / sqrt(2) after the warm-up; None: as many as the warm-up has. With
    no warm-up and a timescale the rate of a step does not depend on the length of the run.
    """

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup: WarmUp = 0.02
    timescale: Annotated[int | None, Field(gt=0, description="steps; None: those of the warm-up")] = None

    @model_validator(mode="after")
    def _has_a_scale(self) -> "InverseSqrt":
        if self.timescale is None and not self.warmup:
            raise ValueError("without warm-up, inverse_sqrt needs a timescale in steps")
        return self


ScheduleChoice = Constant | Linear | Cosine | Restarts | WSD | InverseSqrt


class Recompute(Section):
    """What the backward pass makes again instead of keeping (arXiv:1604.06174, arXiv:2205.05198).

    none       everything is kept
    full       a layer keeps its input alone
    layers     `full`, in every `every`-th layer
    operators  each layer keeps the results of its products and of attention; norms, activations and what is rotated
               are made again
    """

    kind: Literal["none", "full", "layers", "operators"] = "none"
    every: Annotated[int | None, Field(gt=1, description="layers: every so many; default 2")] = None

    @model_validator(mode="after")
    def _acts(self) -> "Recompute":
        if self.every is not None and self.kind != "layers":
            raise ValueError(f"every acts with kind layers only, not {self.kind}")
        return self


class Offload(Section):
    """Activations wait for the backward pass in the CPU's memory."""

    above: Annotated[int, Field(ge=0, description="bytes; smaller tensors stay where they are")] = 1 << 20


class Average(Section):
    """An exponential moving average of the weights, for evaluation and export."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    warmup: Annotated[bool, Field(description="begin with a smaller decay: (1 + updates) / (10 + updates)")] = True
