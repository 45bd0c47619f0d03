"""GLM and GLM-4 (arXiv:2406.12793): interleaved rotary pairs on half of each head, biases on q, k and v, gate and up in
one matrix; GLM-4-0414 has norms on both sides of each sublayer."""

from typing import Any

from hanlin.models.families.family import Family
from hanlin.models.families.keys import Setting
from hanlin.models.families.weights import Rule, fused

LAYER = "model.layers.{}."
GATE_UP = fused(LAYER + "mlp.gate_up_proj.weight", (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"))
SETTINGS = {
    "num_key_value_heads": Setting(("attention.kv_heads",), int, 2),
    "head_dim": Setting(("attention.head_dim",), int, 128),
    "rms_norm_eps": Setting(("norm_eps",), float, 1.5625e-7),
    "max_position_embeddings": Setting(("max_positions",), int, 131072),
    "attention_bias": Setting(("attention.qkv_bias",), bool, True),
    "partial_rotary_factor": Setting(("rope.fraction",), float, 0.5),
}
ALWAYS: dict[str, Any] = {"rope.interleaved": True}
ABSENT: dict[str, Any] = {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329}
SANDWICH: tuple[tuple[str, str] | Rule, ...] = tuple(
    (f"{LAYER}{theirs}.weight", f"{LAYER}{ours}.weight")
    for theirs, ours in (
        ("post_self_attn_layernorm", "post_attention_layernorm"),
        ("post_attention_layernorm", "pre_feedforward_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    )
)

GLM = Family(
    name="glm",
    architecture="GlmForCausalLM",
    settings=SETTINGS,
    always=ALWAYS,
    absent=ABSENT,
    weights=(GATE_UP,),
)
GLM4 = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    settings=SETTINGS,
    always=ALWAYS | {"layer.norms": "sandwich"},
    absent=ABSENT,
    weights=(GATE_UP, *SANDWICH),
)
