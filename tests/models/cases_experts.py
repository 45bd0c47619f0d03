"""Decoders with experts: Mixtral, Qwen2-MoE and Qwen3-MoE, DeepSeek of all three kinds, Llama 4, gpt-oss."""

from copy import deepcopy  # configs of transformers write into the tables that they are given
from functools import partial
from typing import Any

from tests.models.cases import Case, Inputs
from tests.models.oracle import SIZES
from tests.models.twin_deepseek import DeepseekTwin
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

LOOP = {"experts_implementation": "eager"}  # expert by expert: the plainest that transformers has
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8}
DEEP_YARN = YARN | {"rope_theta": 10_000.0, "beta_fast": 4, "beta_slow": 0.1}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 20, "n_routed_experts": 12, "moe_intermediate_size": 16, "num_experts_per_tok": 3,
    "first_k_dense_replace": 1, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 6}),
    "mixtral-window": (
        MixtralConfig,
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7, "head_dim": 24,
         "tie_word_embeddings": True},
    ),
    "qwen2-moe": (
        Qwen2MoeConfig,
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1],
         "shared_expert_intermediate_size": 48},
    ),
    "qwen2-moe-step": (
        Qwen2MoeConfig,
        {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
         "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False,
         "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
    ),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {"head_dim": 24, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen3-moe-window": (
        Qwen3MoeConfig,
        {"num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "mlp_only_layers": [0],
         "attention_bias": True, "use_sliding_window": True, "sliding_window": 6},
    ),
    "deepseek-v2": (
        DeepseekV2Config,
        LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0,
                  "rope_parameters": DEEP_YARN | {"mscale": 0.707, "mscale_all_dim": 1.414}},
    ),
    "deepseek-v2-lite": (
        DeepseekV2Config,
        LATENT | {"q_lora_rank": None, "topk_method": "greedy", "attention_bias": True, "first_k_dense_replace": 0,
                  "n_shared_experts": 1},
    ),
    "deepseek-v3": (
        DeepseekV3Config,
        LATENT | {"num_mtp_layers": 0, "n_group": 4, "topk_group": 2,
                  "rope_parameters": DEEP_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek-v3-halves": (
        DeepseekV3Config,
        LATENT | {"num_mtp_layers": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_interleave": False,
                  "attention_bias": True, "norm_topk_prob": False, "n_shared_experts": 2, "first_k_dense_replace": 2},
    ),
    "llama4": (
        Llama4TextConfig,
        {"num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 32, "intermediate_size_mlp": 80,
         "moe_layers": [1, 2, 3], "pad_token_id": 0, "num_local_experts": 6, "attention_chunk_size": 8,
         "floor_scale": 4, "attn_scale": 0.5},
    ),
    "llama4-maverick": (
        Llama4TextConfig,
        {"num_hidden_layers": 4, "head_dim": 24, "intermediate_size": 32, "intermediate_size_mlp": 80,
         "interleave_moe_layer_step": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "use_qk_norm": False,
         "no_rope_layers": [1, 0, 1, 0], "attention_chunk_size": 9, "attn_temperature_tuning": False,
         "pad_token_id": 0,
         "rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    # positions in all layers: without them a bias of the keys has no gradient
    "llama4-biases": (
        Llama4TextConfig,
        {"num_hidden_layers": 2, "head_dim": 16, "intermediate_size_mlp": 80, "moe_layers": [1], "num_local_experts": 4,
         "attention_chunk_size": 7, "attention_bias": True, "layer_types": ["full_attention", "chunked_attention"],
         "pad_token_id": 0},
    ),
    "gpt-oss": (
        GptOssConfig,
        {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 24, "sliding_window": 6, "swiglu_limit": 0.7,
         "rope_parameters": YARN | {"rope_theta": 150_000.0, "beta_fast": 4.0, "beta_slow": 0.1, "truncate": False}},
    ),
    "gpt-oss-plain": (
        GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "attention_bias": False,
         "tie_word_embeddings": True, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
         "sliding_window": 9},
    ),
}  # fmt: skip


def build(kind: Any, settings: dict[str, Any]):
    return AutoModelForCausalLM.from_config(kind(**deepcopy(SIZES | LOOP | settings)))


def call_twin(model: Any, inputs: Inputs) -> Tensor:
    return model(inputs.ids)


def twin(name: str, **changes: Any) -> Case:
    return Case(name, "deepseek", partial(DeepseekTwin, **changes), reference="own twin", call=call_twin,
                save=lambda model, folder: model.save(folder), reload=False)  # fmt: skip


CASES = [Case(name, kind.model_type, partial(build, kind, settings)) for name, (kind, settings) in CONFIGS.items()]
CASES += [
    twin("deepseek-moe"),
    twin("deepseek-moe-step", num_hidden_layers=5, moe_layer_freq=2, num_key_value_heads=2, norm_topk_prob=True,
         n_shared_experts=None, attention_bias=True),
    twin("deepseek-moe-one", num_experts_per_tok=1, norm_topk_prob=True),
    twin("deepseek-dense", n_routed_experts=None),
]  # fmt: skip
