"""Attention over a part of the keys, and the merge of such parts: exact, whatever the cut.

    part     o_i = softmax(s_i) v_i,  l_i = logsumexp(s_i)
    merge    l = logaddexp(l_1, l_2),  o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2

(FlashAttention, arXiv:2205.14135; used over a cache in Flash-Decoding.) With it keys and values that do not fit on a
device pass through it piece by piece.
"""

import torch
from torch import Tensor


def attend_part(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """q (heads, T, D), k and v (kv_heads, L, …), bias (1 or heads, T, L), 0 or -inf or added -> (out (heads, T, width
    of v) and lse (heads, T, 1), in fp32 or wider). A query that sees none of these keys: out 0, lse -inf."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads = len(k)
    grouped = q.reshape(kv_heads, -1, q.shape[-1])  # (kv_heads, group * T, D): keys are read once for their queries
    scores = (grouped @ k.transpose(-1, -2)).to(wide).view(*q.shape[:2], -1).mul_(scale)  # (heads, T, L)
    if softcap is not None:
        scores = torch.tanh(scores / softcap).mul_(softcap)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp_()
    out = weights.view(kv_heads, grouped.shape[1], -1).to(v.dtype) @ v
    return out.view(*q.shape[:2], -1).to(wide), lse


def merge(first: tuple[Tensor, Tensor] | None, second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two parts (out, lse) as one."""
    if first is None:
        return second
    (o1, l1), (o2, l2) = first, second
    lse = torch.logaddexp(l1, l2)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    return o1 * (l1 - safe).exp() + o2 * (l2 - safe).exp(), lse
