"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B in the layout of their own code (arXiv:2406.12793): a causal decoder with RMS
norms, grouped queries, interleaved rotary pairs on half of each head, and SwiGLU; q, k and v are one matrix, gate and
up another."""

from collections.abc import Mapping
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting
from hanlin.models.families.weights import fused

THEIRS, OURS = "transformer.encoder.layers.{}.", "model.layers.{}."
NAMES = (
    (f"{THEIRS}input_layernorm", f"{OURS}input_layernorm"),
    (f"{THEIRS}self_attention.dense", f"{OURS}self_attn.o_proj"),
    (f"{THEIRS}post_attention_layernorm", f"{OURS}post_attention_layernorm"),
    (f"{THEIRS}mlp.dense_4h_to_h", f"{OURS}mlp.down_proj"),
    ("transformer.encoder.final_layernorm", "model.norm"),
)
FUSED = (
    (f"{THEIRS}self_attention.query_key_value", [f"{OURS}self_attn.{name}_proj" for name in "qkv"]),
    (f"{THEIRS}mlp.dense_h_to_4h", [f"{OURS}mlp.{name}_proj" for name in ("gate", "up")]),
)
TWICE = {"vocab_size": "padded_vocab_size", "num_hidden_layers": "num_layers"}
BASE = 10_000.0


def finish(values: Values, json: Mapping[str, Any]) -> None:
    """What the code takes as said without saying it; the base of the rotary positions."""
    if json.get("multi_query_attention") is not True:
        raise HanlinError('"multi_query_attention" must be true: without it q, k and v are laid out in another way.')
    for key, other in TWICE.items():
        if json.get(key, json[other]) != json[other]:
            raise HanlinError(
                f'"{key}" is {json[key]!r} beside "{other}" {json[other]!r}, which says the same. Keep one.'
            )
    if values["attention.output_bias"]:
        values["attention.qkv_bias"] = True
    ratio = json.get("rope_ratio", 1)
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or ratio <= 0:
        raise HanlinError(f'"rope_ratio" is {ratio!r}; it must be a positive number.')
    if ratio != 1 and "num_hidden_layers" not in json:
        raise HanlinError(
            f'"rope_ratio" is {ratio:g}. ChatGLM2 divides positions by it, ChatGLM3 and GLM-4 multiply the base; only '
            'GLM-4 can be told from the others, by "num_hidden_layers" beside "num_layers". If the base is meant, add '
            "that key."
        )
    values["rope.theta"] = BASE * ratio


def describe(config: ModelConfig) -> dict[str, Any]:
    """The keys that `finish` reads."""
    ratio = (config.rope_theta or BASE) / BASE
    said = {"multi_query_attention": True, "rope_ratio": ratio, "tie_word_embeddings": False}
    return said | {"vocab_size": config.vocab_size, "num_hidden_layers": len(config.layers)}


CHATGLM2 = Family(
    name="chatglm2",
    model_type="chatglm",
    architecture="ChatGLMModel",
    also=("ChatGLMForConditionalGeneration",),
    claims=lambda json: "padded_vocab_size" in json,
    settings={
        "vocab_size": None,
        "intermediate_size": None,
        "num_hidden_layers": None,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": None,
        "rms_norm_eps": None,
        "max_position_embeddings": None,
        "tie_word_embeddings": None,
        "padded_vocab_size": Setting(("vocab_size",), int),
        "num_layers": Setting(("depth",), int),
        "ffn_hidden_size": Setting(("feed_forward.hidden",), int),
        "multi_query_group_num": Setting(("attention.kv_heads",), int, 1),
        "kv_channels": Setting(("attention.head_dim",), int, 128),
        "layernorm_epsilon": Setting(("norm_eps",), float, 1e-5),
        "seq_length": Setting(("max_positions",), int, 2048),
        "add_qkv_bias": Setting(("attention.qkv_bias",), bool, False),
        "add_bias_linear": Setting(("attention.output_bias", "feed_forward.bias"), bool, False),
        "post_layer_norm": Setting(("norm.final",), bool, True),
        "rmsnorm": Setting(
            ("norm.kind",), bool, True, convert=lambda rms: "rms" if rms else "layer", back=lambda kind: kind == "rms"
        ),
        "apply_residual_connection_post_layernorm": Setting(("layer.residual_from_norm",), bool, False),
    },
    always={"rope.interleaved": True, "rope.fraction": 0.5},
    fixed={
        "tie_word_embeddings": False,
        "original_rope": True,
        "fp32_residual_connection": False,
        "interleaved_qkv": False,
        "quantization_bit": 0,
        "prefix_projection": False,
    },
    harmless=frozenset(
        {
            "apply_query_key_layer_scaling",
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "classifier_dropout",
        }
    ),
    hooked=frozenset({"multi_query_attention", "rope_ratio", *TWICE}),
    rotary=False,
    finish=finish,
    describe=describe,
    weights=(
        ("transformer.embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("transformer.output_layer.weight", "lm_head.weight"),
        *((f"{theirs}.{part}", f"{ours}.{part}") for theirs, ours in NAMES for part in ("weight", "bias")),
        *(
            fused(f"{theirs}.{part}", [f"{o}.{part}" for o in ours])
            for theirs, ours in FUSED
            for part in ("weight", "bias")
        ),
    ),
    skipped=("transformer.rotary_pos_emb.inv_freq",),
)
