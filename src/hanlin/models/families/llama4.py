"""Llama 4, text: three layers with interleaved rotary positions that read the own chunk of the text, normed after the
turn, then one without positions that reads everything and sharpens its scores as the text grows. Experts, in all or
every second layer, whose weight scales what goes into them, beside one for every token.

No report is published; positions by layer: arXiv:2501.18795, the temperature: arXiv:2501.19399.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, LayerConfig, ModelConfig, QueryTemperature
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting, read_count
from hanlin.models.families.sparse import (
    ACTIVATION,
    LAYER,
    ROUTER_NOTES,
    dense_indices,
    read_indices,
    renamed_projections,
    with_dense,
)
from hanlin.models.families.values import map_layers
from hanlin.models.families.weights import transposed
from hanlin.models.families.windows import FULL, Windows

CHUNKED = "chunked_attention"
HIDDEN, SIZE = 16384, 8192  # units of a dense feed-forward; tokens of a chunk, and until the temperature rises
HOOKED = frozenset(
    {"moe_layers", "interleave_moe_layer_step", "use_qk_norm", "no_rope_layers", "no_rope_layer_interval"}
    | {"attention_chunk_size", "attn_temperature_tuning", "floor_scale", "attn_scale"}
)
FEED_FORWARD, EXPERTS = "feed_forward", ("gate_up_proj", "down_proj")


def finish(values: Values, json: Mapping[str, Any]) -> None:
    """The expert for every token is as wide as the others."""
    values["experts.shared_hidden"] = values["experts.hidden"]


def each_layer(config: ModelConfig, json: Mapping[str, Any]) -> ModelConfig:
    """Which layers turn, are cut into chunks, have experts."""
    depth = len(config.layers)
    interval = read_count(json, "no_rope_layer_interval", 4, least=1)
    turns = _list(json, "no_rope_layers", depth, (0, 1)) or [int((i + 1) % interval != 0) for i in range(depth)]
    kinds = _list(json, "layer_types", depth, (CHUNKED, FULL)) or [CHUNKED if turn else FULL for turn in turns]
    chunk = read_count(json, "attention_chunk_size", SIZE, least=1)
    tuned = QueryTemperature(read_count(json, "floor_scale", SIZE, least=1), _number(json, "attn_scale", 0.1))
    norms, tunes = _flag(json, "use_qk_norm"), _flag(json, "attn_temperature_tuning")

    def change(index: int, layer: LayerConfig) -> LayerConfig:
        a = layer.attention
        assert isinstance(a, AttentionConfig)
        a = replace(a, chunk=chunk if kinds[index] == CHUNKED else None)
        if turns[index]:
            return replace(layer, attention=replace(a, l2_norm=norms))
        return replace(layer, attention=replace(a, position=None, query_scaling=tuned if tunes else None))

    step = read_count(json, "interleave_moe_layer_step", 1, least=1)
    experts = read_indices(json, "moe_layers", depth)
    if experts is None:
        experts = set(range(step - 1, depth, step))
    return with_dense(map_layers(config, change), lambda i: i not in experts, json.get("intermediate_size_mlp", HIDDEN))


def say_each_layer(config: ModelConfig) -> dict[str, Any]:
    """The same as lists; sizes of the first layer that has them."""
    attentions = [a for layer in config.layers if isinstance(a := layer.attention, AttentionConfig)]
    dense = dense_indices(config)
    said: dict[str, Any] = {
        "no_rope_layers": [int(a.position is not None) for a in attentions],
        "layer_types": [FULL if a.chunk is None else CHUNKED for a in attentions],
        "attention_chunk_size": next((a.chunk for a in attentions if a.chunk is not None), SIZE),
        "use_qk_norm": any(a.l2_norm for a in attentions),
        "moe_layers": [i for i in range(len(config.layers)) if i not in dense],
    }
    tuned = next((s for a in attentions if isinstance(s := a.query_scaling, QueryTemperature)), None)
    said["attn_temperature_tuning"] = tuned is not None
    return said if tuned is None else said | {"floor_scale": tuned.floor, "attn_scale": tuned.scale}


def _list(json: Mapping[str, Any], key: str, depth: int, allowed: tuple[Any, Any]) -> list[Any] | None:
    value = json.get(key)
    if not value:  # as there: an empty list counts as none
        return None
    if not isinstance(value, list) or len(value) < depth or any(item not in allowed for item in value):
        raise HanlinError(f'"{key}" is {value!r}; it must list {allowed[0]!r} or {allowed[1]!r} for {depth} layers.')
    return value[:depth]


def _number(json: Mapping[str, Any], key: str, default: float) -> float:
    value = json.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise HanlinError(f'"{key}" is {value!r}; it must be a number.')
    return float(value)


def _flag(json: Mapping[str, Any], key: str) -> bool:
    value = json.get(key, True)
    if not isinstance(value, int):  # a number in the first files
        raise HanlinError(f'"{key}" is {value!r}; it must be true or false.')
    return bool(value)


LLAMA4 = Family(
    name="llama4_text",
    architecture="Llama4ForCausalLM",
    settings={
        "num_key_value_heads": Setting(("attention.kv_heads",), int, 8, nullable=True),
        "head_dim": Setting(("attention.head_dim",), int, 128),
        "attention_bias": Setting(("attention.qkv_bias", "attention.output_bias"), bool, False),
        "intermediate_size": Setting(("experts.hidden",), int, 8192),
        "intermediate_size_mlp": Setting(("feed_forward.hidden",), int, HIDDEN),
        "hidden_act": ACTIVATION,
        "num_local_experts": Setting(("experts.count",), int, 16),
        "num_experts_per_tok": Setting(("router.top_k",), int, 1),
        "max_position_embeddings": Setting(("max_positions",), int, 131072),
        "rms_norm_eps": Setting(("norm_eps",), float, 1e-5),
    },
    always={
        "rope.interleaved": True,
        "router.kind": "sigmoid",
        "router.renormalise": False,
        "experts.scale_input": True,
    },
    harmless=ROUTER_NOTES | {"router_jitter_noise", "for_llm_class"},
    hooked=HOOKED,
    absent={"bos_token_id": 1, "eos_token_id": 2},
    windows=Windows("hooked"),
    rope_default=500_000.0,
    finish=finish,
    shape=each_layer,
    describe=say_each_layer,
    weights=(
        (f"{LAYER}{FEED_FORWARD}.router.weight", LAYER + "mlp.router.weight"),
        *(transposed(f"{LAYER}{FEED_FORWARD}.experts.{name}", f"{LAYER}mlp.experts.{name}") for name in EXPERTS),
        *renamed_projections(FEED_FORWARD, "mlp"),
        *renamed_projections(f"{FEED_FORWARD}.shared_expert", "mlp.shared"),
    ),
)
