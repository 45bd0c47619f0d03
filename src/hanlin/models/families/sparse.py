"""What families with experts share: which layers have them, and how their files name the experts' weights."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import ExpertsConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hanlin.models.families.keys import Setting, known_activation
from hanlin.models.families.values import map_layers
from hanlin.models.families.weights import Rule, stacked

LAYER = "model.layers.{}."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ROUTER_NOTES = frozenset({"output_router_logits", "router_aux_loss_coef"})  # of training, which a recipe describes here
ACTIVATION = Setting(("experts.activation", "feed_forward.activation"), str, "silu", convert=known_activation)


def expert_weights(
    place: str = "mlp", *, names: tuple[str, str, str] = PROJECTIONS, shared: str | None = None
) -> tuple[tuple[str, str] | Rule, ...]:
    """The rows of a weight table whose files hold one tensor for each expert and projection. place: their module in a
    layer; names: gate, up and down of an expert; shared: the module of the expert that every token goes through."""
    gate, up, down = (f"{LAYER}{place}.experts.{{e}}.{name}.weight" for name in names)
    rows: list[tuple[str, str] | Rule] = [
        (f"{LAYER}{place}.gate.weight", f"{LAYER}mlp.router.weight"),
        stacked((gate, up), f"{LAYER}mlp.experts.gate_up_proj"),
        stacked((down,), f"{LAYER}mlp.experts.down_proj"),
    ]
    if shared is not None:
        rows += renamed_projections(f"{place}.{shared}", "mlp.shared")
    return tuple(rows)


def renamed_projections(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Gate, up and down of a feed-forward that is called otherwise in a layer."""
    return [(f"{LAYER}{theirs}.{name}.weight", f"{LAYER}{ours}.{name}.weight") for name in PROJECTIONS]


def with_dense(config: ModelConfig, is_dense: Callable[[int], bool], hidden: int) -> ModelConfig:
    """The config with a plain feed-forward of `hidden` units in the place of the experts where `is_dense(index)`."""

    def change(index: int, layer: LayerConfig) -> LayerConfig:
        f = layer.feed_forward
        if not isinstance(f, ExpertsConfig) or not is_dense(index):
            return layer
        return replace(layer, feed_forward=FeedForwardConfig(hidden, activation=f.activation, gated=f.gated))

    return map_layers(config, change)


def dense_indices(config: ModelConfig) -> list[int]:
    """Which layers have no experts."""
    return [i for i, layer in enumerate(config.layers) if not isinstance(layer.feed_forward, ExpertsConfig)]


def first_experts(config: ModelConfig) -> ExpertsConfig | None:
    """The experts of the first layer that has some."""
    return next((f for layer in config.layers if isinstance(f := layer.feed_forward, ExpertsConfig)), None)


def read_indices(json: Mapping[str, Any], key: str, depth: int) -> set[int] | None:
    """A list of layers; None where it is null or absent."""
    value = json.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or any(type(i) is not int or not 0 <= i < depth for i in value):
        raise HanlinError(f'"{key}" is {value!r}; it must be a list of layers, 0 to {depth - 1}.')
    return set(value)
