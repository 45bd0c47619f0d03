"""Dual Chunk Attention (arXiv:2402.17463): rotary attention far past the trained length, without training.

A model that was trained on c positions has never seen a relative position of c or more. The sequence is cut into chunks
of s < c tokens, a key at i has position i mod s for ever, and a query at i takes one of three positions, by how many
chunks lie between it and the key (w = c - s by default):

    same chunk       i mod s                                   the true distance
    the chunk before i mod s + s for i mod s < w, else c - 1    the true distance to what is near
    further back     c - 1                                      far is far; order within each chunk is kept

so that every relative position is in 0 … c - 1. A sequence of one chunk is plain rotary attention, exactly.

LogN scaling (`log_n_scale`) keeps the entropy of attention as the number of keys grows: a query that has n > c keys is
multiplied by log_c n (Qwen, arXiv:2309.16609; the argument is in arXiv:2202.12172).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError

Turn = Callable[[Tensor, Tensor], Tensor]  # x (rows, T, heads, D), positions (1, T) -> x rotated to its positions


@dataclass(frozen=True)
class DualChunk:
    """chunk: tokens a chunk (s). trained: positions the model was trained on (c). near: how many tokens at the start of
    a chunk keep their true distance to the chunk before (w); default: all that fit, c - s."""

    chunk: int
    trained: int
    near: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.chunk < self.trained:
            raise HanlinError(
                f"DualChunk: chunk is {self.chunk}, expected 1 … {self.trained - 1}: less than the trained length."
            )
        if self.near is not None and not 0 <= self.near <= self.trained - self.chunk:
            raise HanlinError(
                f"DualChunk: near is {self.near}, expected 0 … {self.trained - self.chunk}, or a relative position "
                f"would pass the trained length of {self.trained}."
            )

    def keys(self, index: Tensor) -> Tensor:
        """The position a key turns by, whoever looks at it: a cache may hold it rotated."""
        return index % self.chunk

    def queries(self, index: Tensor, chunks_back: int) -> Tensor:
        """The position a query turns by for keys 0, 1, or more chunks back."""
        inside, last = index % self.chunk, self.trained - 1
        if chunks_back == 0:
            return inside
        near = self.trained - self.chunk if self.near is None else self.near
        if chunks_back == 1:
            return torch.where(inside < near, inside + self.chunk, last)
        return torch.full_like(index, last)


def dual_chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: DualChunk, turn: Turn, *, scale: float | None = None
) -> Tensor:
    """Causal attention with the positions of `pattern`, one chunk of queries at a time: no more products than plain.

    q (rows, T, heads, D), k (rows, L, kv_heads, D), not yet rotated; v (rows, L, kv_heads, E), kv_heads dividing heads
    -> (rows, T, heads, E). The queries are the last T of the L tokens: all of them, or the new ones after a cache.
    turn: the model's rotary embedding. scale: default D^-1/2.
    """
    length, heads, D = q.shape[1:]
    total, kv_heads = k.shape[1:3]
    if length > total or heads % kv_heads:
        raise HanlinError(
            f"Dual chunk attention got {length} queries of {heads} heads and {total} keys of {kv_heads}; expected no "
            "more queries than keys, and heads a multiple of the key heads."
        )
    scale = D**-0.5 if scale is None else scale
    index = torch.arange(total, device=q.device)
    first = total - length  # the index of the first query
    s = pattern.chunk
    turned_k = turn(k, pattern.keys(index)[None]).permute(0, 2, 3, 1)[:, :, None]  # (rows, kv_heads, 1, D, L)
    values = v.transpose(1, 2)[:, :, None]  # (rows, kv_heads, 1, L, E)
    outputs = []
    for start in range(first // s * s, total, s):
        own = index[max(start, first) : start + s]  # the queries of this chunk
        end = min(start + s, total)
        part = q[:, own - first]
        scores = []
        for back, low, high in ((2, 0, max(start - s, 0)), (1, max(start - s, 0), start), (0, start, end)):
            if low < high:
                turned = turn(part, pattern.queries(own, back)[None])
                grouped = turned.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (rows, kv_heads, G, b, D)
                scores.append(grouped @ turned_k[..., low:high])
        score = torch.cat(scores, -1) * scale  # (rows, kv_heads, G, b, end)
        score = score.masked_fill(index[:end] > own[:, None], float("-inf"))
        outputs.append(score.softmax(-1) @ values[..., :end, :])
    return torch.cat(outputs, 3).permute(0, 3, 1, 2, 4).flatten(2, 3)


def log_n_scale(positions: Tensor, trained: int) -> Tensor:
    """What a query is multiplied by: positions (…) integers from 0 -> fp32 (…), log_trained(n) where n = position + 1
    is more than `trained`, else 1."""
    if trained < 2:
        raise HanlinError(f"log_n_scale: trained is {trained}, expected a length of at least 2 tokens.")
    seen = (positions + 1).to(torch.float64)
    return (seen.log() / torch.tensor(float(trained), dtype=torch.float64).log()).clamp(min=1.0).to(torch.float32)
