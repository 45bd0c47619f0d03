"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") and GPT-3 (arXiv:2005.14165).

Learnt positions, layer norms in front, biases everywhere, tanh GELU, q, k and v in one matrix stored as (in, out).
GPT-3 is GPT-2 with locally banded attention in every other layer; no file of it was published, so Hanlin saves it as
`gpt3`, with GPT-2's keys and `attention_band`, the keys that a banded layer sees.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ModelConfig
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting, known_activation
from hanlin.models.families.values import map_layers
from hanlin.models.families.weights import Rule, fused, transposed

SIZES = {
    "vocab_size": Setting(("vocab_size",), int, 50257),
    "n_positions": Setting(("max_positions",), int, 1024),
    "n_embd": Setting(("width",), int, 768),
    "n_layer": Setting(("depth",), int, 12),
    "n_head": Setting(("attention.heads",), int, 12),
    "n_inner": Setting(("feed_forward.hidden",), int, None),
    "activation_function": Setting(("feed_forward.activation",), str, "gelu_new", convert=known_activation),
    "layer_norm_epsilon": Setting(("norm_eps",), float, 1e-5),
    "initializer_range": Setting(("init_std",), float, 0.02),
    "tie_word_embeddings": Setting(("tied_embeddings",), bool, True),
}
BIASED: dict[str, Any] = {
    "attention.qkv_bias": True,
    "attention.output_bias": True,
    "attention.position": None,
    "feed_forward.bias": True,
    "feed_forward.gated": False,
    "norm.kind": "layer",
    "embedding.positions": "learned",
}
_NOTES = """
    resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout n_ctx predict_special_tokens n_special
"""
NOTES = frozenset(_NOTES.split())
BLOCK = "model.layers.{}."
QKV = tuple(f"{BLOCK}self_attn.{x}_proj" for x in "qkv")


def conv_weights(theirs: str) -> tuple[tuple[str, str] | Rule, ...]:
    """The matrices of a GPT block under `theirs`, all stored as (in, out)."""
    return (
        fused(theirs + "attn.c_attn.weight", [f"{name}.weight" for name in QKV], transpose=True),
        fused(theirs + "attn.c_attn.bias", [f"{name}.bias" for name in QKV]),
        transposed(theirs + "attn.c_proj.weight", BLOCK + "self_attn.o_proj.weight"),
        (theirs + "attn.c_proj.bias", BLOCK + "self_attn.o_proj.bias"),
        transposed(theirs + "mlp.c_fc.weight", BLOCK + "mlp.up_proj.weight"),
        (theirs + "mlp.c_fc.bias", BLOCK + "mlp.up_proj.bias"),
        transposed(theirs + "mlp.c_proj.weight", BLOCK + "mlp.down_proj.weight"),
        (theirs + "mlp.c_proj.bias", BLOCK + "mlp.down_proj.bias"),
    )


def biased(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    """A module's weight and bias under another name."""
    return (f"{theirs}.weight", f"{ours}.weight"), (f"{theirs}.bias", f"{ours}.bias")


def fill_hidden(values: Values, json: Mapping[str, Any]) -> None:
    """Four times the width where `n_inner` is not given."""
    if values["feed_forward.hidden"] is None:
        values["feed_forward.hidden"] = 4 * values["width"]


def band(config: ModelConfig, json: Mapping[str, Any]) -> ModelConfig:
    """Every other layer, from the second on, sees the last `attention_band` keys only."""
    size = json.get("attention_band", 128)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise HanlinError(f'"attention_band" is {size!r}; it must be a positive integer.')
    return map_layers(config, lambda i, la: replace(la, attention=replace(la.attention, window=size)) if i % 2 else la)


def say_band(config: ModelConfig) -> dict[str, Any]:
    """The band of the first layer that has one."""
    sizes = [la.attention.window for la in config.layers if isinstance(la.attention, AttentionConfig)]
    return {"attention_band": next((size for size in sizes if size), 128)}


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    bare="GPT2Model",
    common=SIZES,
    always=BIASED,
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False},
    harmless=NOTES,
    absent={"bos_token_id": 50256, "eos_token_id": 50256},
    rotary=False,
    finish=fill_hidden,
    weights=(
        *conv_weights("transformer.h.{}."),
        ("transformer.wte.weight", "model.embed_tokens.weight"),
        ("transformer.wpe.weight", "model.embed_positions.weight"),
        *biased("transformer.h.{}.ln_1", BLOCK + "input_layernorm"),
        *biased("transformer.h.{}.ln_2", BLOCK + "post_attention_layernorm"),
        *biased("transformer.ln_f", "model.norm"),
    ),
    skipped=("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
    prefix="transformer.",
)
GPT3 = replace(
    GPT2, name="gpt3", model_type="gpt3", architecture="GPT3LMHeadModel", bare=None, prefix="",
    hooked=frozenset({"attention_band"}), shape=band, describe=say_band,
)  # fmt: skip
