"""Qwen 1 (arXiv:2309.16609), whose code lives beside its weights: q, k and v in one matrix with a bias, gate and up
named w2 and w1, each half as wide as `intermediate_size` says. Past `seq_length` tokens it reads on by a dynamic NTK
base and by queries that grow with the logarithm of their position."""

from collections.abc import Mapping
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, LogN, ModelConfig
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting
from hanlin.models.families.values import first_attention
from hanlin.models.families.weights import Rule, fused
from hanlin.nn.rope import Rope
from hanlin.nn.stepped_ntk import SteppedNtk

THEIRS, OURS = "transformer.h.{}.", "model.layers.{}."


def read_long_context(values: Values, json: Mapping[str, Any]) -> None:
    """`use_dynamic_ntk` and `use_logn_attn`, which Qwen's code has on by default, from `seq_length` on."""
    if values["attention.head_dim"] * values["attention.heads"] != values["width"]:
        raise HanlinError(
            f'"kv_channels" is {values["attention.head_dim"]}; Qwen needs "hidden_size" / "num_attention_heads", '
            f"{values['width']} / {values['attention.heads']}."
        )
    switches = {key: json.get(key, True) for key in ("use_dynamic_ntk", "use_logn_attn")}
    for key, on in switches.items():
        if not isinstance(on, bool):
            raise HanlinError(f'"{key}" is {on!r}; it must be true or false.')
    if not any(switches.values()):
        return
    trained = json.get("seq_length")
    if not isinstance(trained, int) or isinstance(trained, bool) or trained < 2:
        named = " and ".join(f'"{key}"' for key, on in switches.items() if on)
        raise HanlinError(f'"seq_length" is {trained!r}; with {named} it must be an integer of at least 2.')
    if switches["use_dynamic_ntk"]:
        values["rope.scaling"] = SteppedNtk(trained)
    if switches["use_logn_attn"]:
        values["attention.query_scaling"] = LogN(trained)


def write_long_context(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_long_context` reads."""
    a = first_attention(config)
    scaling = a.position.scaling if isinstance(a.position, Rope) else None
    logn = a.query_scaling if isinstance(a, AttentionConfig) else None
    trained = [found.trained for found in (scaling, logn) if isinstance(found, SteppedNtk | LogN)]
    return {
        "use_dynamic_ntk": isinstance(scaling, SteppedNtk),
        "use_logn_attn": isinstance(logn, LogN),
        "seq_length": trained[0] if trained else config.extra.get("seq_length", config.max_positions),
    }


def _both(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{THEIRS}{theirs}.{part}", f"{OURS}{ours}.{part}") for part in ("weight", "bias"))


def _qkv(part: str) -> Rule:
    return fused(f"{THEIRS}attn.c_attn.{part}", [f"{OURS}self_attn.{name}_proj.{part}" for name in "qkv"])


QWEN = Family(
    name="qwen",
    architecture="QWenLMHeadModel",
    settings={
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": None,
        "rms_norm_eps": None,
        "intermediate_size": Setting(
            ("feed_forward.hidden",), int, 22016, convert=lambda n: n // 2, back=lambda n: 2 * n
        ),
        "kv_channels": Setting(("attention.head_dim",), int, 128),
        "layer_norm_epsilon": Setting(("norm_eps",), float, 1e-6),
        "max_position_embeddings": Setting(("max_positions",), int, 8192),
        "rotary_pct": Setting(("rope.fraction",), float, 1.0),
        "rotary_emb_base": Setting(("rope.theta",), float, 10_000.0),
        "no_bias": Setting(
            ("attention.output_bias", "feed_forward.bias"), bool, True, convert=lambda b: not b, back=lambda b: not b
        ),
    },
    always={"attention.qkv_bias": True},
    fixed={"scale_attn_weights": True, "use_cache_quantization": False},
    harmless=frozenset(
        {
            "seq_length",
            "emb_dropout_prob",
            "attn_dropout_prob",
            "bf16",
            "fp16",
            "fp32",
            "onnx_safe",
            "use_flash_attn",
            "use_cache_kernel",
            "softmax_in_fp32",
        }
    ),
    hooked=frozenset({"use_dynamic_ntk", "use_logn_attn"}),
    rotary=False,  # said by keys of their own
    finish=read_long_context,
    describe=write_long_context,
    weights=(
        ("transformer.wte.weight", "model.embed_tokens.weight"),
        ("transformer.ln_f.weight", "model.norm.weight"),
        (f"{THEIRS}ln_1.weight", f"{OURS}input_layernorm.weight"),
        (f"{THEIRS}ln_2.weight", f"{OURS}post_attention_layernorm.weight"),
        _qkv("weight"),
        _qkv("bias"),
        *_both("attn.c_proj", "self_attn.o_proj"),
        *_both("mlp.w2", "mlp.gate_proj"),
        *_both("mlp.w1", "mlp.up_proj"),
        *_both("mlp.c_proj", "mlp.down_proj"),
    ),
    skipped=("transformer.rotary_emb.inv_freq", f"{THEIRS}attn.masked_bias", f"{THEIRS}attn.logn_tensor"),
)
