"""GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"): GPT-2's block with the
layer norms behind the sums, and none at the end."""

from collections.abc import Mapping
from typing import Any

from hanlin.models.families.family import Family, Values
from hanlin.models.families.gpt2 import BIASED, BLOCK, NOTES, SIZES, biased, conv_weights
from hanlin.models.families.keys import Setting

NAMES = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}  # its "gelu" is the tanh form


def fill_hidden(values: Values, json: Mapping[str, Any]) -> None:
    """Always four times the width."""
    values["feed_forward.hidden"] = 4 * values["width"]


GPT1 = Family(
    name="openai-gpt",
    architecture="OpenAIGPTLMHeadModel",
    bare="OpenAIGPTModel",
    common=SIZES,
    settings={
        "vocab_size": Setting(("vocab_size",), int, 40478),
        "n_positions": Setting(("max_positions",), int, 512),
        "n_inner": None,
        "activation_function": None,
        "afn": Setting(
            ("feed_forward.activation",), str, "gelu", convert=lambda name: NAMES[name],
            back=lambda name: {ours: theirs for theirs, ours in reversed(NAMES.items())}[name],
        ),
    },
    always=BIASED | {"layer.norms": "post", "norm.final": False},
    harmless=NOTES,
    rotary=False,
    finish=fill_hidden,
    weights=(
        *conv_weights("transformer.h.{}."),
        ("transformer.tokens_embed.weight", "model.embed_tokens.weight"),
        ("transformer.positions_embed.weight", "model.embed_positions.weight"),
        *biased("transformer.h.{}.ln_1", BLOCK + "post_attention_layernorm"),
        *biased("transformer.h.{}.ln_2", BLOCK + "post_feedforward_layernorm"),
    ),
    skipped=("transformer.h.{}.attn.bias", "transformer.position_ids"),
    prefix="transformer.",
)  # fmt: skip
