"""The `parallel:` section of a recipe: over how many ranks each axis of a run is laid. Plain numbers, no torch.

    world = pipeline x data x context x tensor

Neighbouring ranks share a tensor group, because that axis talks most; the pipeline, which talks least, is outermost.
Experts are spread over ranks of the data axis: `expert` of them hold one set of experts together.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.core.errors import HanlinError
from hanlin.core.recipe import Section

Count = Annotated[int, Field(gt=0)]
Schedule = Literal["naive", "gpipe", "1f1b", "interleaved", "zero_bubble"]
SEVERAL_STAGES = ("interleaved", "zero_bubble")  # schedules in which a rank holds more than one stage


class Layout(Section):
    """How a run is laid over its processes. The default is plain data parallelism over all of them."""

    data: Annotated[int | None, Field(gt=0, description="replicas; None: as many as the other axes leave")] = None
    shard: Annotated[
        Literal["none", "zero1", "zero2", "zero3"],
        Field(description="what the replicas share: nothing, optimiser, + gradients, + weights (ZeRO)"),
    ] = "none"
    tensor: Annotated[Count, Field(description="ranks that share each matrix (Megatron)")] = 1
    sequence: Annotated[bool, Field(description="the ranks of `tensor` share the tokens between matrices, too")] = False
    pipeline: Annotated[Count, Field(description="ranks that hold consecutive layers")] = 1
    schedule: Schedule = "1f1b"
    chunks: Annotated[int | None, Field(gt=1, description="stages a rank (interleaved, zero_bubble: default 2)")] = None
    context: Annotated[Count, Field(description="ranks that share each row's tokens in attention")] = 1
    context_kind: Literal["ring", "ulysses"] = "ring"
    expert: Annotated[Count, Field(description="ranks of the data axis that share the experts")] = 1

    @model_validator(mode="after")
    def _act(self) -> "Layout":
        """Refuse what would be ignored."""
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence shares tokens among the ranks of `tensor`: set tensor to 2 or more, or leave it")
        if self.chunks is not None and self.schedule not in SEVERAL_STAGES:
            raise ValueError(f"chunks acts with the schedules {' and '.join(SEVERAL_STAGES)} only, not {self.schedule}")
        if self.pipeline == 1 and self.chunks is not None:
            raise ValueError(f"chunks {self.chunks} are stages of a pipeline: set pipeline to 2 or more, or leave it")
        if self.pipeline == 1 and self.schedule != "1f1b":
            raise ValueError(
                f"schedule {self.schedule} orders the stages of a pipeline: set pipeline to 2 or more, or leave it"
            )
        if self.context == 1 and self.context_kind != "ring":
            raise ValueError(
                f"context_kind {self.context_kind} says how context ranks talk: set context to 2 or more, or leave it"
            )
        if self.data is not None and self.data % self.expert:
            raise ValueError(f"expert {self.expert} does not divide data {self.data}")
        return self

    @property
    def stages_a_rank(self) -> int:
        """Pipeline stages that each rank holds."""
        return (self.chunks or 2) if self.schedule in SEVERAL_STAGES and self.pipeline > 1 else 1

    @property
    def inner(self) -> int:
        """Ranks of one replica's rows: all axes but data."""
        return self.tensor * self.pipeline * self.context

    def fitted(self, world: int) -> "Layout":
        """This layout over `world` processes, with `data` filled in; `HanlinError` if they do not fit."""
        if world % self.inner:
            raise HanlinError(
                f"parallel: tensor {self.tensor} x pipeline {self.pipeline} x context {self.context} = {self.inner} "
                f"ranks do not divide the {world} processes of this run."
            )
        data = world // self.inner
        if self.data not in (None, data):
            raise HanlinError(
                f"parallel: data {self.data} x {self.inner} ranks of the other axes are {self.data * self.inner} "
                f"processes, but {world} were started. Start so many (--nproc), or leave parallel.data out."
            )
        if data % self.expert:
            raise HanlinError(f"parallel: expert {self.expert} does not divide the {data} ranks of the data axis.")
        if self.shard != "none" and data * self.context == 1:
            raise HanlinError(f"parallel.shard is {self.shard}, but there is one replica only: nothing to share.")
        return self.model_copy(update={"data": data})
