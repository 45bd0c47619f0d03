"""Qwen2-MoE (arXiv:2407.10671) and Qwen3-MoE (arXiv:2505.09388): small experts in all layers, in every n-th, or in all
but some. Qwen2-MoE has one more expert that every token goes through, scaled by a sigmoid of the token."""

from collections.abc import Callable, Mapping
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting, read_count
from hanlin.models.families.qwen3 import QWEN3
from hanlin.models.families.sparse import (
    ACTIVATION,
    LAYER,
    ROUTER_NOTES,
    dense_indices,
    expert_weights,
    read_indices,
    with_dense,
)
from hanlin.models.families.windows import Windows

WIDTHS = {"qwen2_moe": 5632, "qwen3_moe": 6144}  # of a dense feed-forward where the file says none
HOOKED = frozenset({"mlp_only_layers", "decoder_sparse_step"})


def choose_layers(hidden: int) -> Callable[[ModelConfig, Mapping[str, Any]], ModelConfig]:
    """Experts stand in every `decoder_sparse_step`-th layer, but not in `mlp_only_layers`."""

    def shape(config: ModelConfig, json: Mapping[str, Any]) -> ModelConfig:
        step = read_count(json, "decoder_sparse_step", 1, least=1)
        only = read_indices(json, "mlp_only_layers", len(config.layers)) or set()
        return with_dense(config, lambda i: i in only or (i + 1) % step != 0, json.get("intermediate_size", hidden))

    return shape


def say_layers(config: ModelConfig) -> dict[str, Any]:
    """The same as a list."""
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense_indices(config)}


def either_name(values: Values, json: Mapping[str, Any]) -> None:
    """transformers 5 calls `num_experts` `num_local_experts`."""
    other = json.get("num_local_experts")
    if other is None:
        return
    if type(other) is not int or other < 1 or json.get("num_experts", other) != other:
        raise HanlinError(
            f'"num_local_experts" is {other!r}; it must be a positive integer, and what "num_experts" says too.'
        )
    values["experts.count"] = other


QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    settings={
        "num_key_value_heads": Setting(("attention.kv_heads",), int, 16),
        "max_position_embeddings": Setting(("max_positions",), int, 32768),
        "intermediate_size": Setting(("feed_forward.hidden",), int, WIDTHS["qwen2_moe"]),
        "hidden_act": ACTIVATION,
        "qkv_bias": Setting(("attention.qkv_bias",), bool, True),
        "num_experts": Setting(("experts.count",), int, 60),
        "num_experts_per_tok": Setting(("router.top_k",), int, 4),
        "moe_intermediate_size": Setting(("experts.hidden",), int, 1408),
        "shared_expert_intermediate_size": Setting(("experts.shared_hidden",), int, 5632),
        "norm_topk_prob": Setting(("router.renormalise",), bool, False),
    },
    always={"experts.shared_gate": True},
    harmless=ROUTER_NOTES,
    hooked=HOOKED,
    windows=Windows("below", 4096),
    shape=choose_layers(WIDTHS["qwen2_moe"]),
    describe=say_layers,
    weights=(
        *expert_weights(shared="shared_expert"),
        (LAYER + "mlp.shared_expert_gate.weight", LAYER + "mlp.shared_gate.weight"),
    ),
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    settings={
        "num_key_value_heads": Setting(("attention.kv_heads",), int, 4),
        "attention_bias": Setting(("attention.qkv_bias", "attention.output_bias"), bool, False),
        "max_position_embeddings": Setting(("max_positions",), int, 32768),
        "intermediate_size": Setting(("feed_forward.hidden",), int, WIDTHS["qwen3_moe"]),
        "hidden_act": ACTIVATION,
        "num_experts": Setting(("experts.count",), int, 128),
        "num_experts_per_tok": Setting(("router.top_k",), int, 8),
        "moe_intermediate_size": Setting(("experts.hidden",), int, 768),
        "norm_topk_prob": Setting(("router.renormalise",), bool, False),
    },
    always=QWEN3.always,
    harmless=ROUTER_NOTES,
    hooked=HOOKED | {"num_local_experts"},
    windows=Windows("switched", 4096),
    finish=either_name,
    shape=choose_layers(WIDTHS["qwen3_moe"]),
    describe=say_layers,
    weights=expert_weights(),
)
