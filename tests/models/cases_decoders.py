"""Gemma 2 and what follows: decoders of the Llama kind with more to them."""

from copy import deepcopy  # configs of transformers write into the tables that they are given
from functools import partial
from typing import Any

from tests.models.cases import Case
from tests.models.oracle import SIZES
from transformers import AutoModelForCausalLM
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.glm import GlmConfig
from transformers.models.glm4 import Glm4Config
from transformers.models.llama import LlamaConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

HALF = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}


def build(kind: Any, settings: dict[str, Any]):
    return AutoModelForCausalLM.from_config(kind(**deepcopy(SIZES | settings)))


CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma2": (
        Gemma2Config,
        {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0, "attention_bias": True, "pad_token_id": 0},
    ),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20, "pad_token_id": 0, "num_hidden_layers": 4,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "rope_theta": 90_000.0, "factor": 4.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
         }},
    ),
    "phi3": (Phi3Config, {"sliding_window": 7, "pad_token_id": 0}),
    "phi3-long": (
        Phi3Config,
        {"pad_token_id": 0, "max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        }},
    ),
    "glm": (GlmConfig, {"head_dim": 16, "pad_token_id": 0, "rope_parameters": HALF}),
    "glm4": (Glm4Config, {"head_dim": 16, "pad_token_id": 0, "num_key_value_heads": 1, "rope_parameters": HALF}),
    "llama-3": (LlamaConfig, {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }}),
    "llama-linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "qwen3-yarn": (Qwen3Config, {"head_dim": 16, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    }}),
    "llama-dynamic": (
        LlamaConfig,
        {"max_position_embeddings": 64,
         "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
    ),
}  # fmt: skip
BY_LENGTH = {"phi3-long", "llama-dynamic"}  # a longer text turns all its keys anew, which a cache of turned keys cannot
CASES = [
    Case(name, kind.model_type, partial(build, kind, settings), cached=name not in BY_LENGTH)
    for name, (kind, settings) in CONFIGS.items()
]
