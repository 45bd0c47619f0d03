"""Random tiny models made by transformers, with every parameter redrawn so that a forgotten one shows."""

from contextlib import contextmanager
from copy import deepcopy  # configs of transformers write into the tables that they are given
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    "initializer_range": 0.03,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}

CONFIGS = {
    "llama": (LlamaConfig, {}),
    "llama-gqa-4": (LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-head-dim": (LlamaConfig, {"head_dim": 24, "num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied-mqa": (Qwen2Config, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-windows": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 24}),
    "qwen3-tied": (Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-biases": (Qwen3Config, {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1}),
    "qwen3-windows": (
        Qwen3Config,
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": 7, "head_dim": 20}),
    "mistral-no-window": (MistralConfig, {"sliding_window": None}),
}


def make_oracle(name: str, *, seed: int = 0, **changes) -> PreTrainedModel:
    """A model of transformers in fp32 whose every parameter is redrawn: norms 1 ± 0.1, biases N(0, 0.1), matrices so
    wide that the logits' standard deviation is at least 0.5."""
    kind, settings = CONFIGS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**deepcopy(SIZES | settings | changes))).eval()
    redraw(model)
    assert logits_of(model, some_ids()).std() >= 0.5
    return model


@torch.no_grad()
def redraw(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(1.0, 0.1)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)


def some_ids(rows: int = 3, length: int = 21, vocabulary: int = 131) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor, **how) -> torch.Tensor:
    return model(ids, **how).logits


@contextmanager
def quiet():
    """transformers reports every file it reads and writes; the tests' output is for the tests."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def save_theirs(model: PreTrainedModel, folder: Path, **how) -> Path:
    with quiet():
        model.save_pretrained(folder, **how)
    return folder


def load_theirs(folder: Path) -> PreTrainedModel:
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    return model.eval()
