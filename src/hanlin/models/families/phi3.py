"""Phi-3 (arXiv:2404.14219): Llama with q, k, v and gate, up stored as one matrix each, LongRoPE for long contexts."""

from typing import Any

from hanlin.models.config import ModelConfig
from hanlin.models.families.family import Family
from hanlin.models.families.keys import Setting
from hanlin.models.families.weights import fused
from hanlin.models.families.windows import Windows
from hanlin.nn.rope import Rope
from hanlin.nn.rope_scaling import LongRope


def trained_length(config: ModelConfig) -> dict[str, Any]:
    """The length from which the long factors hold stands beside the table of factors."""
    position = config.layers[0].attention.position
    scaling = position.scaling if isinstance(position, Rope) else None
    if isinstance(scaling, LongRope) and scaling.trained is not None:
        return {"original_max_position_embeddings": scaling.trained}
    return {}


LAYER = "model.layers.{}."
PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    settings={
        "rms_norm_eps": Setting(("norm_eps",), float, 1e-5),
        "max_position_embeddings": Setting(("max_positions",), int, 4096),
        "partial_rotary_factor": Setting(("rope.fraction",), float, 1.0),
    },
    harmless=frozenset({"resid_pdrop", "embd_pdrop", "original_max_position_embeddings"}),
    absent={"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000},
    windows=Windows("all"),
    whole_heads=True,
    describe=trained_length,
    weights=(
        fused(
            LAYER + "self_attn.qkv_proj.weight",
            (LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"),
        ),
        fused(LAYER + "mlp.gate_up_proj.weight", (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight")),
    ),
)
