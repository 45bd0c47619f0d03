"""Positions as something added to the scores, by distance alone.

    ALiBi     -slope_h * |q - k|           slopes 2^(-8/H), 2^(-16/H), ... for H heads      arXiv:2108.12409
    T5        table[bucket(k - q), h]      learnt; near distances alone, far ones share     arXiv:1910.10683

Both are called with positions q (rows or 1, Tq) and k (rows or 1, Tk) and give (rows or 1, heads, Tq, Tk), ALiBi in
fp32, T5 in the dtype of its table.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError


class Alibi:
    """A penalty that grows with the distance, another slope for each head. Nothing is learnt.

    BLOOM and Baichuan add `slope * k`, which differs by a number for each query: no difference after the softmax.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.slopes = alibi_slopes(heads)  # (heads,)

    def __call__(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        distance = (q_positions[:, None, :, None] - k_positions[:, None, None, :]).abs()  # (rows, 1, Tq, Tk)
        return distance * -self.slopes.to(distance.device)[:, None, None]

    def __repr__(self) -> str:
        return f"Alibi({self.heads})"


def alibi_slopes(heads: int) -> Tensor:
    """(heads,) fp32: 2^(-8 i / H) for i = 1 … H where H is a power of two; else those of the power of two below, then
    every other one of the power of two above (the paper's section 3 and its code)."""
    if heads <= 0:
        raise HanlinError(f"ALiBi got {heads} heads; expected at least one.")
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / below) for i in range(1, below + 1)]
    slopes += [2.0 ** (-4 * i / below) for i in range(1, 2 * (heads - below), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")  # real, too, while a model is built on "meta"


class RelativeBias(nn.Module):
    """T5's learnt bias: embedding (buckets, heads), initialised by the model. The stack's layers share one.

    bidirectional: keys behind and ahead have buckets of their own, half each; else all keys ahead share bucket 0.
    max_distance: from which on all distances share the last bucket.
    """

    def __init__(self, buckets: int, heads: int, *, max_distance: int = 128, bidirectional: bool = True) -> None:
        super().__init__()
        exact = buckets // (4 if bidirectional else 2)
        if exact < 1 or max_distance <= exact:
            raise HanlinError(
                f"Relative positions got {buckets} buckets up to a distance of {max_distance}; expected at least "
                f"{4 if bidirectional else 2} buckets, and a distance above {max(exact, 1)}, where single buckets end."
            )
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional
        self.embedding = nn.Embedding(buckets, heads)

    def forward(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        ahead = k_positions[:, None, :] - q_positions[:, :, None]  # (rows, Tq, Tk)
        buckets = relative_buckets(ahead, self.buckets, self.max_distance, bidirectional=self.bidirectional)
        bias = F.embedding(buckets, self.embedding.weight)  # (rows, Tq, Tk, heads)
        return bias.permute(0, 3, 1, 2).contiguous()

    def extra_repr(self) -> str:
        return f"{self.buckets}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"


def relative_buckets(ahead: Tensor, buckets: int, max_distance: int, *, bidirectional: bool) -> Tensor:
    """ahead (...): key position - query position -> bucket (...) int64.

    Of n buckets for a direction, distances d below e = n/2 have one each, others e + floor((n - e) ln(d/e) / ln(m/e)),
    at most n - 1, with m = max_distance. The logarithm is fp32, as when the models were trained: it decides ties.
    """
    first = torch.zeros_like(ahead)
    if bidirectional:
        buckets //= 2
        first, distance = (ahead > 0) * buckets, ahead.abs()
    else:
        distance = (-ahead).clamp(min=0)
    exact = buckets // 2
    scale = math.log(max_distance / exact)
    far = exact + ((distance.float() / exact).log() / scale * (buckets - exact)).clamp(min=0).long()
    return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
