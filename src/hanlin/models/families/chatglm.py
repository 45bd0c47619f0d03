"""ChatGLM-6B (GLM-130B's layer, arXiv:2210.02414; GLM, arXiv:2103.10360): layer norms with the residual taken from
behind them and scaled, a GELU feed-forward, q, k and v of each head side by side in one matrix.

The prompt sees itself both ways, and each half of a head turns by an axis of its own. What of the ids is prompt only
the caller knows; with `start` the index of the <bos> token and `blank` that of the [gMASK] or [MASK] in each row:

    model(ids, mask=Prefix(start) | Causal(), positions=block_positions(start, blank, length))
"""

from collections.abc import Mapping
from typing import Any

from hanlin.models.config import BlockRopePosition
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting
from hanlin.models.families.weights import interleaved

THEIRS, OURS = "transformer.layers.{}.", "model.layers.{}."
NAMES = (
    (f"{THEIRS}input_layernorm", f"{OURS}input_layernorm"),
    (f"{THEIRS}attention.dense", f"{OURS}self_attn.o_proj"),
    (f"{THEIRS}post_attention_layernorm", f"{OURS}post_attention_layernorm"),
    (f"{THEIRS}mlp.dense_h_to_4h", f"{OURS}mlp.up_proj"),
    (f"{THEIRS}mlp.dense_4h_to_h", f"{OURS}mlp.down_proj"),
    ("transformer.final_layernorm", "model.norm"),
)
QKV = tuple(f"{OURS}self_attn.{name}_proj" for name in "qkv")


def scale_residual(values: Values, json: Mapping[str, Any]) -> None:
    """The residual is multiplied by the root of twice the depth."""
    values["layer.residual_scale"] = (2 * values["depth"]) ** 0.5


def claims(json: Mapping[str, Any]) -> bool:
    return "inner_hidden_size" in json or "position_encoding_2d" in json


CHATGLM = Family(
    name="chatglm",
    architecture="ChatGLMModel",
    also=("ChatGLMForConditionalGeneration",),
    claims=claims,
    settings={
        "intermediate_size": None,
        "num_hidden_layers": None,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": None,
        "rms_norm_eps": None,
        "max_position_embeddings": None,
        "inner_hidden_size": Setting(("feed_forward.hidden",), int, 16384),
        "num_layers": Setting(("depth",), int, 28),
        "layernorm_epsilon": Setting(("norm_eps",), float, 1e-5),
        "max_sequence_length": Setting(("max_positions",), int, 2048),
        "tie_word_embeddings": Setting(("tied_embeddings",), bool, True),  # transformers' own default
    },
    always={
        "attention.position": BlockRopePosition(half=True),
        "attention.qkv_bias": True,
        "attention.output_bias": True,
        "feed_forward.bias": True,
        "feed_forward.gated": False,
        "feed_forward.activation": "gelu_new",
        "layer.residual_from_norm": True,
        "norm.kind": "layer",
    },
    fixed={"position_encoding_2d": True, "quantization_bit": 0, "prefix_projection": False},
    harmless=frozenset({"mask_token_id", "gmask_token_id"}),
    rotary=False,
    finish=scale_residual,
    describe=lambda config: {"position_encoding_2d": True},
    weights=(
        ("transformer.word_embeddings.weight", "model.embed_tokens.weight"),
        *((f"{theirs}.{part}", f"{ours}.{part}") for theirs, ours in NAMES for part in ("weight", "bias")),
        *(
            interleaved(f"{THEIRS}attention.query_key_value.{part}", (f"{q}.{part}", f"{k}.{part}", f"{v}.{part}"))
            for part in ("weight", "bias")
            for q, k, v in (QKV,)
        ),
    ),
    skipped=(f"{THEIRS}attention.rotary_emb.inv_freq",),
)
