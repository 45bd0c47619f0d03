"""What a GPU's fused attention keeps for backward: its inputs, its output and the logarithm of each query's sum.

Fake tensors stand on the CPU, where torch would follow the path that writes all scores down; on a GPU it takes a kernel
that does not (arXiv:2205.14135), with a bias or without.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.nn import attention


@contextmanager
def fused_attention() -> Generator[None]:
    """Within it attention takes the bytes of such a kernel, in a recomputed forward, too (where a `TorchFunctionMode`
    is off), and never the blocks of `nn.block_attention`, which are for CPUs."""
    fused = patch.object(F, "scaled_dot_product_attention", _attend)
    with fused, patch.object(attention, "worth_it", lambda q: False):
        yield


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    return _Fused.apply(q, k, v, attn_mask)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors[:3]
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), None
