"""BLOOM (arXiv:2211.05100): ALiBi in the place of positions, a layer norm behind the embedding, biases everywhere, q, k
and v of each head side by side in one matrix, GELU in its tanh form."""

from collections.abc import Mapping
from typing import Any

from hanlin.models.config import AlibiPosition, ModelConfig
from hanlin.models.families.family import Family, Values
from hanlin.models.families.gpt2 import BLOCK, QKV, biased
from hanlin.models.families.keys import Setting
from hanlin.models.families.weights import interleaved


def fill(values: Values, json: Mapping[str, Any]) -> None:
    """The feed-forward is four times as wide; ALiBi knows no last position, so the trained length is the longest."""
    values["feed_forward.hidden"] = 4 * values["width"]
    values["max_positions"] = int(json.get("seq_length") or 2048)


def say_length(config: ModelConfig) -> dict[str, Any]:
    """`seq_length`, which transformers does not read."""
    return {"seq_length": config.max_positions}


_NOTES = """
    slow_but_exact hidden_dropout masked_softmax_fusion bias_dropout_fusion offset_alibi skip_bias_add skip_bias_add_qkv
    attention_softmax_in_fp32 unk_token_id n_inner
"""
NOTES = frozenset(_NOTES.split())
THEIRS = "transformer.h.{}."
FUSED = THEIRS + "self_attention.query_key_value"
BLOOM = Family(
    name="bloom",
    architecture="BloomForCausalLM",
    bare="BloomModel",
    common={
        "vocab_size": Setting(("vocab_size",), int, 250880),
        "hidden_size": Setting(("width",), int, 64),
        "n_layer": Setting(("depth",), int, 2),
        "n_head": Setting(("attention.heads",), int, 8),
        "layer_norm_epsilon": Setting(("norm_eps",), float, 1e-5),
        "initializer_range": Setting(("init_std",), float, 0.02),
        "tie_word_embeddings": Setting(("tied_embeddings",), bool, True),
        "apply_residual_connection_post_layernorm": Setting(("layer.residual_from_norm",), bool, False),
    },
    always={
        "attention.qkv_bias": True,
        "attention.output_bias": True,
        "attention.position": AlibiPosition(),
        "feed_forward.bias": True,
        "feed_forward.gated": False,
        "feed_forward.activation": "gelu_bloom",
        "norm.kind": "layer",
        "embedding.norm": True,
    },
    hooked=frozenset({"seq_length"}),
    harmless=NOTES,
    absent={"bos_token_id": 1, "eos_token_id": 2},
    rotary=False,
    finish=fill,
    describe=say_length,
    weights=(
        interleaved(FUSED + ".weight", (f"{QKV[0]}.weight", f"{QKV[1]}.weight", f"{QKV[2]}.weight")),
        interleaved(FUSED + ".bias", (f"{QKV[0]}.bias", f"{QKV[1]}.bias", f"{QKV[2]}.bias")),
        *biased(THEIRS + "self_attention.dense", BLOCK + "self_attn.o_proj"),
        *biased(THEIRS + "mlp.dense_h_to_4h", BLOCK + "mlp.up_proj"),
        *biased(THEIRS + "mlp.dense_4h_to_h", BLOCK + "mlp.down_proj"),
        *biased(THEIRS + "input_layernorm", BLOCK + "input_layernorm"),
        *biased(THEIRS + "post_attention_layernorm", BLOCK + "post_attention_layernorm"),
        ("transformer.word_embeddings.weight", "model.embed_tokens.weight"),
        *biased("transformer.word_embeddings_layernorm", "model.embed_norm"),
        *biased("transformer.ln_f", "model.norm"),
    ),
    prefix="transformer.",
)  # fmt: skip
