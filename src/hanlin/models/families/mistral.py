"""Mistral (arXiv:2310.06825): Llama without biases, with one sliding window for all layers (null in later models)."""

from hanlin.models.families.family import Family
from hanlin.models.families.keys import Setting
from hanlin.models.families.windows import Windows

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    settings={
        "num_key_value_heads": Setting(("attention.kv_heads",), int, 8, nullable=True),
        "max_position_embeddings": Setting(("max_positions",), int, 131072),
    },
    windows=Windows("all", 4096),
    absent={"bos_token_id": 1, "eos_token_id": 2},
)
