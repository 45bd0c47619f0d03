"""DeepSpeed-Ulysses: ranks that share tokens share heads while they attend (arXiv:2309.14509).

    (rows, T/n, H, D)  -- all-to-all -->  (rows, T, H/n, D)  -- attention -->  (rows, T, H/n, E)  -- all-to-all -->
    (rows, T/n, H, E)

Every rank attends to whole rows with its own heads, so any kernel and any mask serve. Rank r holds the r-th n-th of a
row. Query heads must divide by the ranks; key heads must, too, or divide them: then each is sent to the n / K ranks
whose query heads share it.

Bytes that a rank gives, a layer, where t = T / n tokens, H query and K key heads, K' = max(K, n), D and E widths of a
key and a value, b bytes a number (what a rank keeps of it is counted, as in every all-to-all):

    forward     rows * t * (H * D + K' * (D + E) + H * E) * b        K' * D where values are a part of the keys
    backward    the same
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.attention import Scores, attend
from hanlin.nn.mask_lowering import Lowered
from hanlin.parallel.collectives import Group, place

Chunk = tuple[int, int]


def consecutive(length: int, ranks: int) -> list[list[Chunk]]:
    """The chunk of each rank: `length`, the tokens of a whole row, is a multiple of `ranks`."""
    size = length // ranks
    return [[(rank * size, (rank + 1) * size)] for rank in range(ranks)]


def check_heads(heads: int, kv_heads: int, ranks: int) -> None:
    """`HanlinError` where these heads cannot be shared by so many ranks."""
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise HanlinError(
            f"parallel.context_kind ulysses shares attention heads: found {heads} query and {kv_heads} key heads for "
            f"{ranks} ranks of parallel.context. Expected query heads that are a multiple of the ranks, and key heads "
            "that are a multiple or a divisor of them. Take another parallel.context, or context_kind ring."
        )


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor | None, scores: Scores, mask: Lowered, group: Group, *, value_dim: int | None = None
) -> Tensor:
    """This rank's queries over whole rows: every rank of `group` calls it with equal shapes.

    q (rows, t, heads, D), k (rows, t, kv_heads, D), v like k, or None for the first `value_dim` numbers of the keys
    -> (rows, t, heads, E). mask: `scores.mask` lowered for the whole row.
    """
    rank, ranks = place(group)
    heads, kv_heads = q.shape[2], k.shape[2]
    check_heads(heads, kv_heads, ranks)
    if kv_heads < ranks:
        copies, kv_heads = ranks // kv_heads, ranks
        k, v = k.repeat_interleave(copies, 2), None if v is None else v.repeat_interleave(copies, 2)
    parts = [q, k] if v is None else [q, k, v]
    mine = [x.unflatten(2, (ranks, -1)) for x in parts]  # (rows, t, n, heads / n, D)
    whole = _to_heads(torch.cat(mine, 3), group)  # (rows, T, heads of all three / n, D)
    own, keys = heads // ranks, kv_heads // ranks
    q, k, *rest = whole.split([own, keys] if v is None else [own, keys, keys], 2)
    v = rest[0] if rest else k[..., :value_dim]
    if scores.sinks is not None:
        scores = replace(scores, sinks=scores.sinks[rank * own : (rank + 1) * own])
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scores, mask).transpose(1, 2)
    return _to_tokens(out, group, ranks)


def _to_heads(x: Tensor, group: Group) -> Tensor:
    """(rows, t, n, h, D), a slice of heads for each rank -> (rows, n * t, h, D), of this rank's heads all tokens."""
    swapped = _Swap.apply(x.movedim(2, 0), group)  # (n, rows, t, h, D), the first of the sender
    return swapped.movedim(0, 1).flatten(1, 2)


def _to_tokens(x: Tensor, group: Group, ranks: int) -> Tensor:
    """(rows, n * t, h, E) -> (rows, t, n * h, E): back."""
    swapped = _Swap.apply(x.unflatten(1, (ranks, -1)).movedim(1, 0), group)  # (n, rows, t, h, E)
    return swapped.movedim(0, 2).flatten(2, 3)


class _Swap(torch.autograd.Function):
    """x (n, …): part i goes to rank i. Its own inverse, and its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(gradients[0], ctx.group), None


def _all_to_all(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous()
    found = torch.empty_like(x)
    dist.all_to_all_single(found, x, group=group)
    return found
