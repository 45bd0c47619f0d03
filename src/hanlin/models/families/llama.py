"""Llama (arXiv:2302.13971, 2307.09288): the plain decoder; biases only where the config asks for them."""

from hanlin.models.families.family import Family
from hanlin.models.families.keys import Setting

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    settings={
        "attention_bias": Setting(("attention.qkv_bias", "attention.output_bias"), bool, False),
        "mlp_bias": Setting(("feed_forward.bias",), bool, False),
        "max_position_embeddings": Setting(("max_positions",), int, 2048),
    },
    absent={"bos_token_id": 1, "eos_token_id": 2},
    whole_heads=True,
)
