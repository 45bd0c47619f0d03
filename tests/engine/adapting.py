"""Random adapters in PEFT's files, and the models that have them in their weights."""

from copy import deepcopy
from pathlib import Path

import torch

from hanlin.models.transformer import Transformer
from hanlin.tune import add_lora, save_lora


def make_adapter(
    model: Transformer, folder: Path, *, seed: int, rank: int = 4, targets="all", dora: bool = False
) -> Transformer:
    """Writes an adapter of `model` into `folder`; returns the merged model."""
    merged = deepcopy(model)
    adapter = add_lora(merged, rank=rank, alpha=2.0 * rank, targets=targets, dora=dora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # the lengths of DoRA
                parameter.mul_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * 0.15)
    save_lora(adapter, folder)
    adapter.merge()
    adapter.remove()
    return merged.eval()
