"""BART (arXiv:1910.13461): the original Transformer with learnt positions (the first two rows of a table are never
read), a norm behind the embedding, GELU, biases everywhere, and a head that shares the embedding and has a bias.
"""

import math
from collections.abc import Mapping
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ModelConfig
from hanlin.models.families.encoder_decoder import first_encoder_layer, flag_of, with_encoder
from hanlin.models.families.family import Family, Values
from hanlin.models.families.gpt2 import biased
from hanlin.models.families.keys import Setting, known_activation, read_count
from hanlin.models.families.weights import Rule

SIZES = {
    "vocab_size": Setting(("vocab_size",), int, 50265),
    "d_model": Setting(("width",), int, 1024),
    "decoder_layers": Setting(("depth",), int, 12),
    "decoder_attention_heads": Setting(("attention.heads",), int, 16),
    "decoder_ffn_dim": Setting(("feed_forward.hidden",), int, 4096),
    "max_position_embeddings": Setting(("max_positions",), int, 1024),
    "activation_function": Setting(("feed_forward.activation",), str, "gelu", convert=known_activation),
    "init_std": Setting(("init_std",), float, 0.02),
}
ALWAYS: dict[str, Any] = {
    "attention.qkv_bias": True,
    "attention.output_bias": True,
    "attention.position": None,
    "feed_forward.bias": True,
    "feed_forward.gated": False,
    "layer.norms": "post",
    "norm.kind": "layer",
    "norm.final": False,
    "norm_eps": 1e-5,
    "head.bias": True,
    "tied_embeddings": True,
}
# "tie_word_embeddings": false would be three different tables of token vectors; the others are switches of old code.
FIXED: dict[str, Any] = {
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "normalize_before": False,
}
NOTES = frozenset({
    "dropout", "activation_dropout", "classifier_dropout", "classif_dropout", "encoder_layerdrop", "decoder_layerdrop",
    "force_bos_token_to_be_generated", "output_past", "_num_labels",
})  # fmt: skip
HOOKED = frozenset(
    {"encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "scale_embedding", "num_hidden_layers"}
)
SKIPPED = tuple(
    f"model.{stack}.{name}" for stack in ("encoder", "decoder") for name in ("embed_tokens.weight", "version")
)


def fill(values: Values, json: Mapping[str, Any]) -> None:
    """`scale_embedding`: token vectors times the root of the width."""
    values["embedding.scale"] = math.sqrt(values["width"]) if flag_of(json, "scale_embedding", False) else None


def shape(config: ModelConfig, json: Mapping[str, Any]) -> ModelConfig:
    """The encoder beside the decoder."""
    depth = read_count(json, "encoder_layers", 12)
    if (also := read_count(json, "num_hidden_layers", depth)) != depth:
        raise HanlinError(f'"num_hidden_layers" is {also} and "encoder_layers" is {depth}; both count the same layers.')
    heads, hidden = read_count(json, "encoder_attention_heads", 16), read_count(json, "encoder_ffn_dim", 4096)
    return with_encoder(config, depth, heads=heads, hidden=hidden)


def describe(config: ModelConfig) -> dict[str, Any]:
    """The encoder's sizes."""
    layer = first_encoder_layer(config)
    assert isinstance(layer.attention, AttentionConfig)
    return {
        "is_encoder_decoder": True,
        "encoder_layers": len(config.encoder),
        "encoder_attention_heads": layer.attention.heads,
        "encoder_ffn_dim": layer.feed_forward.hidden,
        "scale_embedding": config.embedding.scale is not None,
    }


def stack_weights(theirs: str, ours: str, *, cross: bool) -> tuple[tuple[str, str], ...]:
    """The layers of one stack."""
    theirs, ours = theirs + ".layers.{}.", ours + ".layers.{}."
    rows = {f"{theirs}self_attn.{x}_proj": f"{ours}self_attn.{x}_proj" for x in "qkv"}
    rows[theirs + "self_attn.out_proj"] = ours + "self_attn.o_proj"
    rows[theirs + "self_attn_layer_norm"] = ours + "post_attention_layernorm"
    if cross:
        rows |= {f"{theirs}encoder_attn.{x}_proj": f"{ours}cross_attn.{x}_proj" for x in "qkv"}
        rows[theirs + "encoder_attn.out_proj"] = ours + "cross_attn.o_proj"
        rows[theirs + "encoder_attn_layer_norm"] = ours + "cross_attention_layernorm"
    rows |= {theirs + "fc1": ours + "mlp.up_proj", theirs + "fc2": ours + "mlp.down_proj"}
    rows[theirs + "final_layer_norm"] = ours + "post_feedforward_layernorm"
    return tuple(pair for name, our in rows.items() for pair in biased(name, our))


WEIGHTS: tuple[tuple[str, str] | Rule, ...] = (
    ("model.shared.weight", "model.embed_tokens.weight"),
    *stack_weights("model.encoder", "encoder", cross=False),
    *stack_weights("model.decoder", "model", cross=True),
    Rule(
        ("final_logits_bias",),
        ("lm_head.bias",),
        lambda t, shapes, c: [t[0].reshape(shapes[0])],
        lambda t, c: [t[0][None]],
    ),
)
BART = Family(
    name="bart",
    architecture="BartForConditionalGeneration",
    bare="BartModel",
    common=SIZES,
    always=ALWAYS | {"embedding.positions": "learned", "embedding.offset": 2, "embedding.norm": True},
    fixed=FIXED | {"normalize_embedding": True, "static_position_embeddings": False, "extra_pos_embeddings": 2},
    harmless=NOTES,
    hooked=HOOKED,
    absent={
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    },
    rotary=False,
    finish=fill,
    shape=shape,
    describe=describe,
    weights=(
        *WEIGHTS,
        ("model.encoder.embed_positions.weight", "encoder.embed_positions.weight"),
        ("model.decoder.embed_positions.weight", "model.embed_positions.weight"),
        *biased("model.encoder.layernorm_embedding", "encoder.embed_norm"),
        *biased("model.decoder.layernorm_embedding", "model.embed_norm"),
    ),
    skipped=SKIPPED,
    prefix="model.",
)
