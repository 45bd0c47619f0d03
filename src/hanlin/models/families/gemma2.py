"""Gemma 2 (arXiv:2408.00118): norms on both sides of each sublayer, soft-capped scores and logits, a window in every
other layer, norm weights stored as what they differ from 1, token vectors scaled by the root of the width, GeGLU."""

from collections.abc import Mapping
from typing import Any

from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting, known_activation
from hanlin.models.families.windows import Windows


def scale_embedding(values: Values, json: Mapping[str, Any]) -> None:
    """Gemma's token vectors are multiplied by sqrt(width)."""
    values["embedding.scale"] = values["width"] ** 0.5


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    settings={
        "hidden_act": None,
        "hidden_activation": Setting(("feed_forward.activation",), str, "gelu_pytorch_tanh", convert=known_activation),
        "head_dim": Setting(("attention.head_dim",), int, 256),
        "num_key_value_heads": Setting(("attention.kv_heads",), int, 4),
        "max_position_embeddings": Setting(("max_positions",), int, 8192),
        "tie_word_embeddings": Setting(("tied_embeddings",), bool, True),
        "attention_bias": Setting(("attention.qkv_bias", "attention.output_bias"), bool, False),
        "query_pre_attn_scalar": Setting(
            ("attention.scale",), int, 256, convert=lambda n: n**-0.5, back=lambda scale: round(scale**-2)
        ),
        "attn_logit_softcapping": Setting(("attention.softcap",), float, None),
        "final_logit_softcapping": Setting(("head.softcap",), float, None),
    },
    always={"layer.norms": "sandwich", "norm.unit_offset": True},
    fixed={"use_bidirectional_attention": False, "hidden_act": "gelu_pytorch_tanh"},
    absent={"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    windows=Windows("types", 4096, every=2),
    finish=scale_embedding,
)
