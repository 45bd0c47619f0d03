"""gpt-oss (arXiv:2508.10925): a learnt sink in every softmax of attention, windows in every second layer, biases
everywhere, and experts with a clamped SwiGLU, weighed by a softmax over the chosen ones alone."""

from collections.abc import Mapping
from typing import Any

from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting
from hanlin.models.families.sparse import LAYER, ROUTER_NOTES
from hanlin.models.families.weights import alternating, transposed
from hanlin.models.families.windows import Windows
from hanlin.nn.rope_scaling import Yarn

EXPERTS = LAYER + "mlp.experts."


def yarn_unless_said(values: Values, json: Mapping[str, Any]) -> None:
    """Where the file says nothing of the rotary positions they are scaled as in the published models."""
    if not json.get("rope_parameters") and not json.get("rope_scaling"):
        values["rope.scaling"] = Yarn(32.0, trained=4096, beta_fast=32.0, beta_slow=1.0, truncate=False)


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    settings={
        "num_key_value_heads": Setting(("attention.kv_heads",), int, 8, nullable=True),
        "head_dim": Setting(("attention.head_dim",), int, 64),
        "attention_bias": Setting(("attention.qkv_bias", "attention.output_bias"), bool, True),
        "intermediate_size": Setting(("experts.hidden",), int, 2880),
        "hidden_act": None,
        "num_local_experts": Setting(("experts.count",), int, 128),
        "num_experts_per_tok": Setting(("router.top_k",), int, 4),
        "swiglu_limit": Setting(("experts.limit",), float, 7.0),
        "max_position_embeddings": Setting(("max_positions",), int, 131072),
        "rms_norm_eps": Setting(("norm_eps",), float, 1e-5),
    },
    always={"attention.sinks": True, "experts.bias": True, "router.kind": "topk_softmax", "router.bias": True},
    fixed={"hidden_act": "silu", "swiglu_alpha": 1.702},
    harmless=ROUTER_NOTES | {"initial_context_length", "experts_per_token"},  # the latter two stand there twice
    windows=Windows("types", 128, every=2),
    rope_default=150_000.0,
    finish=yarn_unless_said,
    weights=(
        alternating(EXPERTS + "gate_up_proj", EXPERTS + "gate_up_proj", transpose=True),
        alternating(EXPERTS + "gate_up_proj_bias", EXPERTS + "gate_up_proj_bias"),
        transposed(EXPERTS + "down_proj", EXPERTS + "down_proj"),
    ),
)
