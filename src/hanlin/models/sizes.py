"""What a model costs, from its config alone: parameters by part, KV bytes, FLOPs."""

from collections import Counter
from dataclasses import dataclass

import torch

from hanlin.models.config import ModelConfig
from hanlin.models.transformer import Transformer

PARTS = {  # how a part's parameters are named
    "embedding": ("model.embed_tokens.",),
    "attention": (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj."),
    "feed-forward": (".mlp.",),
    "norms": ("norm.",),
    "head": ("lm_head.",),
}


@dataclass(frozen=True)
class Sizes:
    """parameters: {part: how many}; a head that shares the embedding has none of its own."""

    parameters: dict[str, int]
    kv_bytes_per_token: int
    training_flops_per_token: float
    weight_bytes: int

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


def model_sizes(config: ModelConfig, dtype: torch.dtype, length: int | None = None) -> Sizes:
    """Sizes of a model in `dtype`, its FLOPs for sequences of `length` tokens (None: as long as it can)."""
    with torch.device("meta"):
        model = Transformer(config)
    parts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for name, parameter in model.named_parameters():  # shared ones come once
        parts[next(part for part, marks in PARTS.items() if any(mark in name for mark in marks))] += parameter.numel()
    itemsize = dtype.itemsize
    return Sizes(
        dict(parts),
        config.kv_bytes_per_token(itemsize),
        config.flops_per_token(length or config.max_positions),
        sum(parts.values()) * itemsize,
    )
