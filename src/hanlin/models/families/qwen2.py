"""Qwen2 and Qwen2.5 (arXiv:2407.10671): biases on q, k and v always; windows layer by layer."""

from hanlin.models.families.family import Family
from hanlin.models.families.keys import Setting
from hanlin.models.families.windows import Windows

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    settings={
        "num_key_value_heads": Setting(("attention.kv_heads",), int, 32, nullable=True),
        "max_position_embeddings": Setting(("max_positions",), int, 32768),
    },
    always={"attention.qkv_bias": True},
    fixed={"attention_bias": True, "qkv_bias": True},
    windows=Windows("each", 4096),
)
