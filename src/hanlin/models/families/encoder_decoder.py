"""What the families with an encoder beside their decoder share: the encoder's layers and the cross-attention.

A table of settings says what a decoder layer is; `with_encoder` puts the encoder beside it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, LayerConfig, ModelConfig


def with_encoder(
    config: ModelConfig, depth: int, *, heads: int | None = None, hidden: int | None = None
) -> ModelConfig:
    """A decoder of equal layers -> the same with cross-attention like its self-attention, without positions, and with
    `depth` layers of an encoder that looks both ways. heads, hidden: the encoder's, where they differ."""
    layer = config.layers[0]
    own = layer.attention
    assert isinstance(own, AttentionConfig)
    cross = replace(own, position=None, bidirectional=True)
    inside = replace(own, bidirectional=True)
    if heads is not None:
        if config.width % heads:
            raise HanlinError(f"The width {config.width} does not divide among the encoder's {heads} heads.")
        inside = replace(inside, heads=heads, kv_heads=heads, head_dim=config.width // heads)
    f = layer.feed_forward if hidden is None else replace(layer.feed_forward, hidden=hidden)
    encoder = (replace(layer, attention=inside, feed_forward=f),) * depth
    return replace(config, layers=(replace(layer, cross_attention=cross),) * len(config.layers), encoder=encoder)


def first_encoder_layer(config: ModelConfig) -> LayerConfig:
    """The layer of which `config.json` says the encoder's sizes; `HanlinError` for a model without an encoder."""
    if not config.encoder:
        raise HanlinError(
            f'The family "{config.family}" has an encoder beside its decoder; this model has none. '
            "Choose another family."
        )
    return config.encoder[0]


def flag_of(json: Mapping[str, Any], key: str, default: bool) -> bool:
    """A key that is true or false, or its default where it is absent."""
    value = json.get(key)
    if value is not None and not isinstance(value, bool):
        raise HanlinError(f'"{key}" is {value!r}; it must be true or false.')
    return default if value is None else value
