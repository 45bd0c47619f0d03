"""A model cut into stages of consecutive layers, of which each rank of a pipeline holds some.

    one stage a rank      0 | 1 | 2 | 3                  naive, gpipe, 1f1b
    round and round       0 4 | 1 5 | 2 6 | 3 7          interleaved; zero_bubble with more than 2 stages a rank
    down and up           0 7 | 1 6 | 2 5 | 3 4          zero_bubble with 2 stages a rank (ZB-V, arXiv:2401.10241, 6)

The embedding stands before the first stage's layers, the last norm and the head behind the last stage's. What belongs
to other ranks is taken out of the model, so `model.parameters()` are this rank's, under the names of the whole model.
A tied embedding is held by the first stage and the last.
"""

from typing import Any

from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.models.config import BucketPosition, ModelConfig, RelativeAttentionConfig
from hanlin.models.shared import Shared
from hanlin.models.transformer import Transformer
from hanlin.nn.linear import Linear
from hanlin.parallel.settings import SEVERAL_STAGES, Schedule

TABLE = "model.embed_tokens.weight"


def stage_layers(config: ModelConfig, stages: int) -> list[range]:
    """Which layers each stage holds.

    The embedding counts as one layer and so does the head. No stage costs more than the even share, rounded up; among
    such cuts the layers are as even as they can be, and of two equal stages the later gets one more, because an earlier
    one keeps more micro-batches at a time. `HanlinError` if there are fewer layers than stages.
    """
    depth = len(config.layers)
    if stages > depth:
        raise HanlinError(
            f"parallel.pipeline: {depth} layers cannot be cut into {stages} stages (ranks x chunks), one layer each at "
            "least. Take fewer ranks, or fewer chunks."
        )
    ends = [0] * stages
    ends[0] += 1
    ends[-1] += config.head is not None
    most = -(-(depth + sum(ends)) // stages)
    counts = [1] * stages
    for _ in range(depth - stages):
        room = [s for s in range(stages) if counts[s] + ends[s] < most]
        counts[min(room, key=lambda s: (counts[s], -s))] += 1
    stops = [sum(counts[: s + 1]) for s in range(stages)]
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def rank_stages(index: int, ranks: int, schedule: Schedule, chunks: int | None = None) -> list[int]:
    """The stages of rank `index`, ascending. chunks: stages a rank (None: 2 for schedules that take several)."""
    chunks = stages_a_rank(schedule, chunks)
    if schedule == "zero_bubble" and chunks == 2:
        return [index, 2 * ranks - 1 - index]
    return [index + turn * ranks for turn in range(chunks)]


def stages_a_rank(schedule: Schedule, chunks: int | None = None) -> int:
    """`chunks` where it is given; `HanlinError` where the schedule cannot take it."""
    several = schedule in SEVERAL_STAGES
    chunks = chunks or (2 if several else 1)
    if several and chunks < 2:
        raise HanlinError(f"parallel.schedule {schedule} needs 2 stages a rank or more (chunks); found {chunks}.")
    if not several and chunks > 1:
        raise HanlinError(
            f"parallel.schedule {schedule} takes one stage a rank; found chunks {chunks}. Take interleaved."
        )
    return chunks


def sends(index: int, ranks: int, schedule: Schedule, chunks: int | None = None) -> int:
    """How many states and gradients rank `index` sends for each micro-batch: one for each border between one of its
    stages and a stage of another rank. Summed over the ranks it is 2 * borders between ranks."""
    mine = set(rank_stages(index, ranks, schedule, chunks))
    last = ranks * len(mine) - 1
    return sum(s < last and s + 1 not in mine for s in mine) + sum(s > 0 and s - 1 not in mine for s in mine)


class Stage(nn.Module):
    """Layers `layers` of a model that `cut_stages` cut; the first embeds, the last norms.

    index of count: which stage of the pipeline it is. Its modules are the model's own.
    """

    def __init__(self, model: Transformer, index: int, count: int, layers: range) -> None:
        super().__init__()
        self.index, self.count, self.layers = index, count, layers
        self.first, self.last = index == 0, index == count - 1
        self._model = (model,)  # in a tuple: its parameters are not this stage's
        stack = model.model
        ends = [(self.first, stack.embed_tokens if self.first else None), (self.first, stack.embed_positions)]
        ends += [(self.first, stack.embed_segments), (self.first, stack.embed_norm), (self.last, stack.norm)]
        ends += [(self.last, model.head_transform), (self.last, model.lm_head)]
        around = [module for mine, module in ends if mine and module is not None]
        self.held = nn.ModuleList([*(stack.layers[number] for number in layers), *around])

    @property
    def model(self) -> Transformer:
        """What this rank holds of the model."""
        return self._model[0]

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """x: ids (rows, T) in the first stage, else what the stage before gave (rows, T, width) -> (rows, T, width)."""
        model = self.model
        if self.first:
            x = model.model.begin(model.embed(x), shared)
        for number in self.layers:
            x = model.model.layers[number](x, shared)
        return model.model.end(x) if self.last else x


class HeldLayers(nn.ModuleList):
    """Some of a model's layers, under their numbers in the whole model: `layers[number]`; iterating gives modules."""

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        for number, layer in layers.items():
            self.add_module(str(number), layer)

    def __getitem__(self, idx: Any) -> Any:
        if not isinstance(idx, int) or str(idx) not in self._modules:
            raise HanlinError(f"This rank holds layers {', '.join(self._modules)}; found the index {idx!r}.")
        return self._modules[str(idx)]


def cut_stages(
    model: Transformer, index: int, ranks: int, schedule: Schedule, chunks: int | None = None
) -> list[Stage]:
    """Leave rank `index`'s part of a whole model in it, in place -> its stages, ascending.

    The rest's memory is given back. Modules keep their names. The model itself can no longer be called: a stage can.
    `HanlinError` for what cannot be cut.
    """
    _refuse(model, ranks)
    mine = rank_stages(index, ranks, schedule, chunks)
    cuts = stage_layers(model.config, ranks * len(mine))
    first, last = 0 in mine, len(cuts) - 1 in mine
    stack = model.model
    held = {number: stack.layers[number] for stage in mine for number in cuts[stage]}
    stack.layers = HeldLayers(held)
    if not (first or (last and is_tied(model))):
        del stack.embed_tokens
    if not first:
        stack.embed_positions = stack.embed_segments = stack.embed_norm = None
    if not last:
        stack.norm = model.head_transform = model.lm_head = None
    model.register_forward_pre_hook(_refuse_call)
    return [Stage(model, stage, len(cuts), cuts[stage]) for stage in mine]


def is_tied(model: Transformer) -> bool:
    """Whether the head of a whole model is its embedding."""
    return model.lm_head is not None and model.lm_head.weight is model.model.embed_tokens.weight


def _refuse(model: Transformer, ranks: int) -> None:
    """What cannot be cut into stages."""
    config = model.config
    reason = None
    if isinstance(model.model.layers, HeldLayers):
        reason = "the model is cut into stages already"
    elif ranks < 2:
        reason = f"a pipeline has 2 ranks or more, found {ranks}"
    elif model.encoder is not None:
        reason = "the model has an encoder and a decoder, whose layers are no single row of stages"
    elif model.ahead is not None:
        reason = "the model predicts several tokens ahead (predict_ahead), which reads the embedding in the last stage"
    elif any(isinstance(module, Linear) and module.branch is not None for module in model.modules()):
        reason = "the model has an adapter, which holds on to the layers of other ranks, too"
    elif any(isinstance(layer.attention, RelativeAttentionConfig) for layer in config.layers):
        reason = "the model has relative attention in two streams (XLNet)"
    elif any(isinstance(layer.attention.position, BucketPosition) for layer in config.layers):
        reason = "all layers share one table of position buckets (T5)"
    if reason is not None:
        raise HanlinError(f"parallel.pipeline: {reason}. Set parallel.pipeline to 1.")


def _refuse_call(model: nn.Module, _: Any) -> None:
    assert isinstance(model, Transformer)
    numbers = ", ".join(name for name, _ in model.model.layers.named_children())
    raise HanlinError(
        f"This rank holds layers {numbers} of {len(model.config.layers)} only, as its part of a pipeline. Run it by "
        "`parallel.pipeline.Pipeline`: `step` to train it, `evaluate` to measure it."
    )
