"""The fields of a `ModelConfig` as one flat table of dotted names, which is what the keys of a `config.json` speak of.

    {"width": 64, "depth": 3, "attention.heads": 4, "rope.theta": 1e4, "feed_forward.hidden": 96, "norm.kind": "rms",
    ...}

`assemble` makes a config of equal layers from such a table; `flatten` reads the table off a config (of the first layer
of each kind, without its window).
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import (
    AttentionConfig,
    EmbeddingConfig,
    ExpertsConfig,
    FeedForwardConfig,
    HeadConfig,
    LatentAttentionConfig,
    LayerConfig,
    Mixer,
    ModelConfig,
    NormConfig,
    RelativeAttentionConfig,
)
from hanlin.models.families.keys import rope_fraction
from hanlin.nn.rope import Rope
from hanlin.nn.routing import RouterConfig

MIXERS = {"attention": AttentionConfig, "latent": LatentAttentionConfig, "relative": RelativeAttentionConfig}


def assemble(values: dict[str, Any]) -> ModelConfig:
    """A config of `depth` equal layers. `latent.` or `relative.` fields instead of `attention.` ones choose the mixer;
    `experts.` fields choose experts."""
    kinds = {key.partition(".")[0] for key in values}
    mixer = next((name for name in ("latent", "relative") if name in kinds), "attention")
    attention = _under(f"{mixer}.", values)
    if mixer == "attention":
        _fill_heads(attention, values["width"])
    rope = _under("rope.", values)
    if rope and "position" not in attention:
        width = attention["rope_dim" if mixer == "latent" else "head_dim"]
        fraction = rope.pop("fraction", None)
        dim = None if fraction in (None, 1.0) else int(width * fraction)
        rope.setdefault("dim", dim)
        attention["position"] = Rope(**rope)
    feed_forward: FeedForwardConfig | ExpertsConfig
    if values.get("experts.count"):
        router = RouterConfig(**_under("router.", values))
        feed_forward = ExpertsConfig(router=router, **_under("experts.", values))
    else:
        feed_forward = FeedForwardConfig(**_under("feed_forward.", values))
    layer = LayerConfig(MIXERS[mixer](**attention), feed_forward, **_under("layer.", values))
    plain = {k: v for k, v in values.items() if "." not in k and k not in ("depth", "head")}
    head = None if "head" in values and values["head"] is None else HeadConfig(**_under("head.", values))
    return ModelConfig(
        layers=(layer,) * values["depth"],
        norm=NormConfig(**_under("norm.", values)),
        embedding=EmbeddingConfig(**_under("embedding.", values)),
        head=head,
        **plain,
    )


def flatten(config: ModelConfig) -> dict[str, Any]:
    """The table of a config: its first layer's mixer, its first dense and its first expert feed-forward."""
    layer, every = config.layers[0], config.layers + config.encoder
    values: dict[str, Any] = {"depth": len(config.layers)}
    nested = {"layers", "encoder", "extra", "family", "norm", "embedding", "head"}
    values |= {f.name: getattr(config, f.name) for f in fields(config) if f.name not in nested}
    mixer = next(name for name, kind in MIXERS.items() if isinstance(layer.attention, kind))
    values |= _over(f"{mixer}.", layer.attention, without=("position", "window"))
    position = next((part.attention.position for part in every if isinstance(part.attention.position, Rope)), None)
    if position is not None:
        values |= _over("rope.", position) | {"rope.fraction": rope_fraction(config)}
    dense = next((p.feed_forward for p in every if isinstance(p.feed_forward, FeedForwardConfig)), None)
    experts = next((p.feed_forward for p in every if isinstance(p.feed_forward, ExpertsConfig)), None)
    if dense is not None:
        values |= _over("feed_forward.", dense)
    if experts is not None:
        values |= _over("experts.", experts, without=("router",)) | _over("router.", experts.router)
    values |= _over("layer.", layer, without=("attention", "feed_forward", "cross_attention"))
    values |= _over("norm.", config.norm) | _over("embedding.", config.embedding)
    return values if config.head is None else values | _over("head.", config.head)


def map_layers(config: ModelConfig, change: Any) -> ModelConfig:
    """The config with `change(index, layer)` in the place of each layer."""
    return replace(config, layers=tuple(change(i, layer) for i, layer in enumerate(config.layers)))


def with_position(layer: LayerConfig, position: Any) -> LayerConfig:
    """The layer with other positions."""
    return replace(layer, attention=replace(layer.attention, position=position))


def first_attention(config: ModelConfig) -> Mixer:
    return config.layers[0].attention


def plain_values(value: Any) -> Any:
    """A value that can stand in a set."""
    return tuple(value) if isinstance(value, list) else value


def _fill_heads(attention: dict[str, Any], width: int) -> None:
    """`kv_heads` and `head_dim` where the file leaves them to follow from the others."""
    heads = attention["heads"]
    if attention.get("kv_heads") is None:
        attention["kv_heads"] = heads
    if attention.get("head_dim") is None:
        if width % heads:
            raise HanlinError(
                f'"hidden_size" {width} does not divide among "num_attention_heads" {heads}, and there is no '
                '"head_dim" that says how wide a head is.'
            )
        attention["head_dim"] = width // heads


def _under(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _over(prefix: str, part: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    assert is_dataclass(part)
    return {f"{prefix}{f.name}": getattr(part, f.name) for f in fields(part) if f.name not in without}
