"""Mixtral (arXiv:2401.04088): Mistral with experts in every layer, of which a token goes to two, weighed by a softmax
over these two."""

from hanlin.models.families.family import Family
from hanlin.models.families.keys import Setting, known_activation
from hanlin.models.families.sparse import ROUTER_NOTES, expert_weights
from hanlin.models.families.windows import Windows

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    settings={
        "num_key_value_heads": Setting(("attention.kv_heads",), int, 8, nullable=True),
        "intermediate_size": Setting(("experts.hidden",), int, 14336),
        "hidden_act": Setting(("experts.activation",), str, "silu", convert=known_activation),
        "num_local_experts": Setting(("experts.count",), int, 8),
        "num_experts_per_tok": Setting(("router.top_k",), int, 2),
        "max_position_embeddings": Setting(("max_positions",), int, 131072),
        "rms_norm_eps": Setting(("norm_eps",), float, 1e-5),
    },
    fixed={"router_jitter_noise": 0.0},
    harmless=ROUTER_NOTES,
    absent={"bos_token_id": 1, "eos_token_id": 2},
    windows=Windows("all"),
    rope_default=1_000_000.0,
    weights=expert_weights("block_sparse_moe", names=("w1", "w3", "w2")),
)
