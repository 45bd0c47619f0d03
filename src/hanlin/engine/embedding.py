"""The meaning of a text as a vector: the mean of its last hidden states."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hanlin.models.transformer import Transformer


def writes(model: Transformer) -> bool:
    """Whether it generates: it has an output head, and no layer of its decoder looks ahead."""
    return model.lm_head is not None and not any(layer.attention.bidirectional for layer in model.config.layers)


def mean_pooled(model: Transformer, ids: Sequence[int]) -> Tensor:
    """The mean of a text's last hidden states, of length 1: (width,) fp32."""
    tokens = torch.tensor([list(ids)], device=model.device)
    hidden = model.encode(tokens) if model.encoder is not None else model(tokens, logits=None).hidden
    return torch.nn.functional.normalize(hidden[0].float().mean(0), dim=0).cpu()
