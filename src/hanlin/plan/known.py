"""Sizes of well-known models, so that they can be planned without a file: the keys of their `config.json`, read by the
family's own table (`models.families`), as the model folder would be.

A name is the model's name in lower case. Numbers are those of the published `config.json`; what changes no size (token
ids, temperatures of YaRN) is left out.
"""

import difflib
from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.models.families import family_of

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
_QWEN_3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}
_QWEN_3_MOE = _QWEN_3 | {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}

KNOWN: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-70b": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "qwen3-0.6b": _QWEN_3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
       "tie_word_embeddings": True},
    "qwen3-1.7b": _QWEN_3
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
       "tie_word_embeddings": True},
    "qwen3-8b": _QWEN_3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
       "tie_word_embeddings": False},
    "qwen3-30b-a3b": _QWEN_3_MOE
    | {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
       "num_attention_heads": 32},
    "qwen3-235b-a22b": _QWEN_3_MOE
    | {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
       "num_attention_heads": 64},
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-r1": _DEEPSEEK_V3,
}  # fmt: skip


def known_config(name: str) -> ModelConfig:
    """The config of a well-known model; `HanlinError` with the nearest name for another."""
    key = name.lower()
    if key not in KNOWN:
        near = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.5)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        raise HanlinError(
            f"`{name}` is no file, no model folder and no known model.{meant} Known are {', '.join(KNOWN)}; anything "
            "else is planned from its recipe, its model folder or its config.json."
        )
    return family_of(KNOWN[key], key).read(KNOWN[key], Path(f"plan/known.py: {key}"))
