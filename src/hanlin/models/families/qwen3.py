"""Qwen3 (arXiv:2505.09388): an RMS norm on each query and key head, heads as wide as `head_dim` says, no QKV bias."""

from hanlin.models.families.family import Family
from hanlin.models.families.keys import Setting
from hanlin.models.families.windows import Windows

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    settings={
        "num_key_value_heads": Setting(("attention.kv_heads",), int, 32, nullable=True),
        "head_dim": Setting(("attention.head_dim",), int, 128),
        "attention_bias": Setting(("attention.qkv_bias", "attention.output_bias"), bool, False),
        "max_position_embeddings": Setting(("max_positions",), int, 32768),
    },
    always={"attention.qk_norm": True},
    windows=Windows("each", 4096),
)
