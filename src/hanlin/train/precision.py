"""Mixed precision without autocast: fp32 weights, bf16 activations (`Transformer.compute_dtype`), fp32 gradients.

Every `Linear` casts its weight on use; norms, softmax and loss keep fp32 statistics. bf16 has fp32's range, so no loss
scaling is needed.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from hanlin.models.transformer import Transformer


def widen_weights(model: Transformer) -> None:
    """fp32 weights where trainable ones are of half precision: small updates would be lost in 8 or 11 bits."""
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters() if p.requires_grad):
        model.float()


@contextmanager
def training_mode(model: Transformer, *, bf16: bool, compile: bool) -> Generator[None]:
    """The model as training wants it; afterwards as it was before, without gradients."""
    was, dtype, compiled = model.training, model.compute_dtype, model._compiled_call_impl
    model.train()
    model.compute_dtype = torch.bfloat16 if bf16 else None
    if compile:
        model.compile()
    try:
        yield
    finally:
        model.train(was)
        model.compute_dtype, model._compiled_call_impl = dtype, compiled
        for parameter in model.parameters():
            parameter.grad = None
