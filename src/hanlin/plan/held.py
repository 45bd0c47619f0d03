"""Exactly what one rank of a layout holds, unit by unit, in numbers: what ZeRO gathers and data parallelism sums.

A unit is a layer; the rest is the embedding, the last norm, the head, what looks ahead. Biases of products whose
outputs are summed stay on tensor rank 0; key heads fewer than the ranks are held by several; a vocabulary that does not
divide is cut as evenly as can be.
"""

from dataclasses import dataclass, replace

from hanlin.models.accounting import count_parameters
from hanlin.models.config import AttentionConfig, ExpertsConfig, LatentAttentionConfig, LayerConfig, ModelConfig
from hanlin.models.tensor_plan import share
from hanlin.parallel.settings import Layout
from hanlin.parallel.stages import rank_stages, stage_layers
from hanlin.parallel.tensor import local_config


@dataclass(frozen=True)
class Held:
    """layers: {number: (dense numbers, numbers of experts)} of this rank; rest: dense numbers outside of them, ahead:
    those of the experts that look ahead; table: of the embedding here; first, last: whether the first and the last
    stage are among its own; config: the local one."""

    layers: dict[int, tuple[int, int]]
    rest: int
    ahead: int
    table: int
    first: bool
    last: bool
    config: ModelConfig

    @property
    def total(self) -> int:
        return self.rest + self.ahead + sum(dense + experts for dense, experts in self.layers.values())


def held_by(config: ModelConfig, layout: Layout, *, pipeline: int = 0, tensor: int = 0) -> Held:
    """What the rank at these places of the pipeline and the tensor axis holds."""
    local = local_config(config, layout.tensor) if layout.tensor > 1 else config
    stages = stage_layers(config, layout.pipeline * layout.stages_a_rank)
    mine = rank_stages(pipeline, layout.pipeline, layout.schedule, layout.stages_a_rank) if layout.pipeline > 1 else [0]
    first, last = 0 in mine, len(stages) - 1 in mine
    numbers = [number for stage in mine for number in stages[stage]]
    once = tensor > 0
    layers = {n: _layer(local, local.layers[n], layout, once=once) for n in numbers}
    start, stop = share(config.vocab_size, tensor, layout.tensor)
    table = (stop - start) * config.width
    whole = count_parameters(local).parts
    norm = config.width * (2 if config.norm.kind == "layer" and config.norm.bias else 1)
    rest = ahead = 0
    if first:
        rest += table + whole["embedding"] - config.vocab_size * config.width
        rest += norm * config.embedding.norm
    if last:
        rest += norm * config.norm.final + _head(config, table, stop - start, first=first)
        if config.predict_ahead:
            dense, experts = _layer(local, local.layers[-1], layout, once=once)
            rest += config.predict_ahead * (dense + 2 * config.width**2 + 3 * norm)
            ahead = config.predict_ahead * experts
    return Held(layers, rest, ahead, table, first, last, local)


def _head(config: ModelConfig, table: int, rows: int, *, first: bool) -> int:
    """Numbers of the head on the last stage; a tied one is the embedding's table, held again where that is another
    rank's."""
    if config.head is None:
        return 0
    own = 0 if config.tied_embeddings and first else table
    transform = config.width**2 + config.width if config.head.transform else 0
    return own + rows * config.head.bias + transform + (transform > 0) * config.width


def _layer(local: ModelConfig, layer: LayerConfig, layout: Layout, *, once: bool) -> tuple[int, int]:
    """(dense numbers, numbers of experts) of a layer of a local config. once: without biases that rank 0 keeps."""
    f = layer.feed_forward
    parts = dict(count_parameters(replace(local, layers=(layer,), encoder=(), predict_ahead=0)).parts)
    total = sum(parts.values()) - _outside(replace(local, layers=(layer,), encoder=(), predict_ahead=0))
    experts = 0
    if isinstance(f, ExpertsConfig):
        ways, width = (2 if f.gated else 1), local.width
        first = f.hidden * ways * (width + f.bias)
        down = width * (f.hidden + f.bias)
        experts = f.count * (first + down)
        total -= experts
        experts = f.count // layout.expert * (first + down - width * f.bias * once)
    if once:
        a = layer.attention
        biased = a.output_bias if isinstance(a, AttentionConfig) else isinstance(a, LatentAttentionConfig) and a.bias
        total -= local.width * bool(biased)
        total -= local.width * (0 if isinstance(f, ExpertsConfig) else f.bias)
    return total, experts


def _outside(config: ModelConfig) -> int:
    """Numbers of a one-layer config that are no layer's: what two layers have less than twice."""
    one = count_parameters(config).total
    two = count_parameters(replace(config, layers=config.layers * 2)).total
    return 2 * one - two
