"""Gemma 2 and what follows: decoders of the Llama kind with more to them."""

from functools import partial
from typing import Any

from tests.models.cases import Case
from tests.models.oracle import SIZES
from transformers import AutoModelForCausalLM
from transformers.models.gemma2 import Gemma2Config

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}}


def build(kind: Any, settings: dict[str, Any]):
    return AutoModelForCausalLM.from_config(kind(**SIZES | settings))


CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma2": (
        Gemma2Config,
        {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0, "attention_bias": True, "pad_token_id": 0},
    ),
}  # fmt: skip
CASES = [Case(name, kind.model_type, partial(build, kind, settings)) for name, (kind, settings) in CONFIGS.items()]
