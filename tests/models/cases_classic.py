"""GPT-1, GPT-2, GPT-3 and BLOOM."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.models.cases import Case
from tests.models.oracle import save_theirs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.bloom import BloomConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.openai import OpenAIGPTConfig

SIZES = {"vocab_size": 131, "n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "attn_implementation": "eager"}
BAND = 5


def build(kind: Any, settings: dict[str, Any]) -> nn.Module:
    return AutoModelForCausalLM.from_config(kind(**settings))


def build_gpt3() -> nn.Module:
    """transformers' GPT-2, whose odd layers get a mask that hides what lies `BAND` or more keys back."""
    model = build(GPT2Config, SIZES)

    def narrow(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden: Tensor = arguments[0]
        index = torch.arange(hidden.shape[1])
        distance = index[:, None] - index[None, :]
        shown = (distance >= 0) & (distance < BAND)
        bias = torch.zeros(shown.shape, dtype=hidden.dtype).masked_fill(~shown, torch.finfo(hidden.dtype).min)
        rest = list(arguments[1:])
        for place, value in enumerate(rest):  # the mask comes by place or by name, as the version likes
            if isinstance(value, Tensor) and value.dim() == 4:
                rest[place] = bias[None, None]
                return (hidden, *rest), named
        return arguments, named | {"attention_mask": bias[None, None]}

    for layer in model.transformer.h[1::2]:
        layer.register_forward_pre_hook(narrow, with_kwargs=True)
    return model


def save_gpt3(model: Any, folder: Path) -> None:
    save_theirs(model, folder)
    file = folder / "config.json"
    table = json.loads(file.read_text()) | {"model_type": "gpt3", "attention_band": BAND}
    table["architectures"] = ["GPT3LMHeadModel"]
    file.write_text(json.dumps(table))


BLOOM = {"vocab_size": 131, "hidden_size": 64, "n_layer": 3, "n_head": 4, "attn_implementation": "eager"}
CASES = [
    Case("gpt1", "openai-gpt", partial(build, OpenAIGPTConfig, SIZES)),
    Case("gpt2", "gpt2", partial(build, GPT2Config, SIZES)),
    Case("gpt2-untied", "gpt2", partial(build, GPT2Config, SIZES | {"n_inner": 96, "tie_word_embeddings": False})),
    Case("gpt3", "gpt3", build_gpt3, reference="GPT-2, banded masks", save=save_gpt3, reload=False),
    Case("bloom", "bloom", partial(build, BloomConfig, BLOOM)),
    Case("bloom-6-heads", "bloom", partial(
        build, BloomConfig,
        BLOOM | {"hidden_size": 48, "n_head": 6, "apply_residual_connection_post_layernorm": True},
    )),
]  # fmt: skip
