"""Llama, Qwen2, Qwen3 and Mistral in every variant that `oracle.CONFIGS` lists."""

from copy import deepcopy  # configs of transformers write into the tables that they are given
from functools import partial

from tests.models.cases import Case
from tests.models.oracle import CONFIGS, SIZES
from transformers import AutoModelForCausalLM


def build(name: str):
    kind, settings = CONFIGS[name]
    return AutoModelForCausalLM.from_config(kind(**deepcopy(SIZES | settings)))


CASES = [Case(name, CONFIGS[name][0].model_type, partial(build, name)) for name in CONFIGS]
