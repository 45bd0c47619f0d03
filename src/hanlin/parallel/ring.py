"""Ring attention: rows too long for one device, whose keys and values travel around a ring of ranks (arXiv:2310.01889).

    step s = 0 … n-1     rank r holds the keys and values of rank r - s, and attends to them with its own queries
                         while the next block is already on its way
    merge                l = logaddexp(l_1, l_2),  o = e^(l_1 - l) o_1 + e^(l_2 - l) o_2      (`nn.partial_attention`)
    backward             P = e^(s - l) with the merged l; keys and values travel once more, and behind them their
                         gradients, which arrive at home after n - 1 steps
                         dS = P * (do V^T - do . o)    dQ += dS K    dK += dS^T Q    dV += P^T do

A rank holds two chunks of the row, r and 2n-1-r of 2n ("zigzag"): under a causal mask every rank then computes two
tiles of chunk x chunk a step, where consecutive chunks would leave rank 0 idle and rank n-1 at work all the time.

Bytes that a rank sends, a layer, where t = T / n tokens, K key heads, D and E widths of a key and a value (E = 0 where
values are a part of the keys), b bytes a number and w = max(b, 4), the width of the sums:

    forward     (n - 1) * rows * t * K * (D + E) * b
    backward    (n - 1) * rows * t * K * (D + E) * (b + w)

Forward is computed (and sent) once more where activations are recomputed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hanlin.nn.attention import Scores
from hanlin.nn.masks import Causal, Mask, hides_the_future, reach
from hanlin.nn.partial_attention import merge
from hanlin.parallel.collectives import Group, place

Chunk = tuple[int, int]  # [start, stop) in the whole row
QUERIES = 512  # of a tile: bounds the matrix of scores
KEYS, GRADIENTS = 0, 1  # tags of what travels


@dataclass(frozen=True, eq=False)
class Piece:
    """Local queries and local keys of which some see some. hidden (rows or 1, 1, queries, keys) bool: True where a
    query does not see a key; None: every query sees every key."""

    queries: slice
    keys: slice
    hidden: Tensor | None


Plan = list[list[Piece]]  # of each step


def zigzag(length: int, ranks: int) -> list[list[Chunk]]:
    """The two chunks of each rank: `length`, the tokens of a whole row, is a multiple of 2 * ranks."""
    size = length // (2 * ranks)
    return [[(i * size, (i + 1) * size) for i in (rank, 2 * ranks - 1 - rank)] for rank in range(ranks)]


def ring_plan(mask: Mask, chunks: Sequence[Sequence[Chunk]], rank: int, device: torch.device) -> Plan:
    """What this rank computes at each step: the pieces that are not hidden altogether. chunks: of every rank.

    On a CPU the mask itself is asked; elsewhere, where that would wait for the device, only what its kind promises:
    the future is skipped, and what lies behind its `reach`.
    """
    ranks = len(chunks)
    plan: Plan = []
    for step in range(ranks):
        found = []
        for at_q, (first, last) in _local(chunks[rank], QUERIES):
            for at_k, (start, stop) in _local(chunks[(rank - step) % ranks], None):
                piece = _piece(mask, (first, last), (start, stop), at_q, at_k, device)
                if piece is not None:
                    found.append(piece)
        plan.append(found)
    return plan


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor | None, scores: Scores, plan: Plan, group: Group, *, value_dim: int | None = None
) -> Tensor:
    """This rank's queries over the keys of all ranks of `group`, exact: every rank calls it with equal shapes.

    q (rows, t, heads, D), k (rows, t, kv_heads, D), v (rows, t, kv_heads, E) or None, for the first `value_dim` numbers
    of the keys -> (rows, t, heads, E). plan: `ring_plan` of the mask. scores: its scale, softcap and sinks count.
    """
    travels = k if v is None else torch.cat([k, v], -1)  # one message a step
    values = slice(0, value_dim) if v is None else slice(k.shape[-1], None)
    out = _Ring.apply(
        q.transpose(1, 2), travels.transpose(1, 2), values, scores.sinks, plan, scores.scale, scores.softcap, group
    )
    return out.transpose(1, 2)


class _Ring(torch.autograd.Function):
    """Shapes: q (rows, H, t, D), kv (rows, K, t, D + E), sinks (H,) -> (rows, H, t, E). Softmax, merge and the sums of
    gradients are fp32, fp64 for fp64."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, values: slice, sinks: Tensor | None, plan: Plan, scale: float,
        softcap: float | None, group: Group,
    ) -> Tensor:  # fmt: skip
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        kv = kv.contiguous()
        width = kv[..., values].shape[-1]
        out = q.new_zeros(*q.shape[:3], width, dtype=wide)
        lse = q.new_full((*q.shape[:3], 1), float("-inf"), dtype=wide)
        block = kv
        for step, pieces in enumerate(plan):
            coming = _Travel(block, group, KEYS) if step + 1 < len(plan) else None
            for piece in pieces:
                at = piece.queries
                key, value = _keys_values(block, piece, values, q.shape[-1])
                scored = _scored(q[:, :, at], key, piece, scale, softcap)[0]
                found = _part(scored, value)
                out[:, :, at], lse[:, :, at] = merge((out[:, :, at], lse[:, :, at]), found)
            if coming is not None:
                block = coming.arrived()
        if sinks is not None:  # one more logit, whose value is zero
            whole = torch.logaddexp(lse, sinks.to(wide)[:, None, None])
            out = out * (lse - whole).exp()
            lse = whole
        result = out.to(q.dtype)
        ctx.save_for_backward(q, kv, sinks, result, lse)
        ctx.values, ctx.plan, ctx.scale, ctx.softcap, ctx.group = values, plan, scale, softcap, group
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, sinks, out, lse = ctx.saved_tensors
        grad, wide = gradients[0], lse.dtype
        delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)  # (rows, H, t, 1)
        grad_q = torch.zeros_like(q, dtype=wide)
        own = torch.zeros_like(kv, dtype=wide)
        block, coming, sums = kv, None, None
        for step, pieces in enumerate(ctx.plan):
            if coming is not None:
                block = coming.arrived()
            coming = _Travel(block, ctx.group, KEYS) if step + 1 < len(ctx.plan) else None
            mine = own if step == 0 else torch.zeros_like(own)
            for piece in pieces:
                _slopes(ctx, piece, q, block, grad, lse, delta, grad_q, mine)
            if step > 0:
                if sums is not None:
                    mine += sums.arrived()
                sums = _Travel(mine, ctx.group, GRADIENTS)
        if sums is not None:
            own += sums.arrived()  # of the own block, from all who saw it
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            share = (sinks.to(wide)[:, None, None] - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
            grad_sinks = -(share * delta).sum((0, 2, 3)).to(sinks.dtype)
        return grad_q.to(q.dtype), own.to(kv.dtype), None, grad_sinks, None, None, None, None


class _Travel:
    """A tensor on its way to the next rank, and the previous rank's on its way here."""

    def __init__(self, tensor: Tensor, group: Group, tag: int) -> None:
        rank, ranks = place(group)
        self._sent, self._received = tensor, torch.empty_like(tensor)  # the sent one stays alive until it is gone
        ahead, behind = (_global_rank(group, (rank + step) % ranks) for step in (1, -1))
        self._works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, self._sent, ahead, group, tag),
            dist.P2POp(dist.irecv, self._received, behind, group, tag),
        ])  # fmt: skip

    def arrived(self) -> Tensor:
        """Wait; what the previous rank held."""
        for work in self._works:
            work.wait()
        return self._received


def _global_rank(group: Group, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def _local(chunks: Sequence[Chunk], size: int | None) -> list[tuple[slice, Chunk]]:
    """Each chunk, cut into pieces of `size`: where it stands among the rank's tokens, and in the row."""
    found, offset = [], 0
    for start, stop in chunks:
        for first in range(start, stop, size or stop - start):
            last = min(stop, first + (size or stop - start))
            found.append((slice(offset + first - start, offset + last - start), (first, last)))
        offset += stop - start
    return found


def _piece(mask: Mask, queries: Chunk, keys: Chunk, at_q: slice, at_k: slice, device: torch.device) -> Piece | None:
    (first, last), (start, stop) = queries, keys
    back = reach(mask)
    if (hides_the_future(mask) and start >= last) or (back is not None and stop <= first - back + 1):
        return None
    if isinstance(mask, Causal) and stop <= first + 1:
        return Piece(at_q, at_k, None)
    visible = mask.dense(torch.arange(first, last, device=device), torch.arange(start, stop, device=device))
    if device.type == "cpu":
        if not visible.any():
            return None
        if visible.all():
            return Piece(at_q, at_k, None)
    return Piece(at_q, at_k, ~visible.expand(-1, last - first, stop - start)[:, None])


def _keys_values(block: Tensor, piece: Piece, values: slice, width: int) -> tuple[Tensor, Tensor]:
    """(rows, K, keys, D) and (rows, K, keys, E) of a piece."""
    part = block[:, :, piece.keys]
    return part[..., :width], part[..., values]


def _scored(
    q: Tensor, key: Tensor, piece: Piece, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:  # q (rows, H, b, D)
    """The logits (rows, H, b, keys), -inf where hidden, wide; and the slope of the soft-cap at each."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, heads, length, _ = q.shape
    logits = (_grouped(q, key.shape[1]) @ key.transpose(-1, -2)).to(wide).view(rows, heads, length, -1) * scale
    slope = None
    if softcap is not None:
        tanh = torch.tanh(logits / softcap)
        logits, slope = tanh * softcap, 1 - tanh.square()
    if piece.hidden is not None:
        logits = logits.masked_fill(piece.hidden, float("-inf"))
    return logits, slope


def _part(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over one piece, and its log-sum: both wide; a query that sees nothing gives 0 and -inf."""
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    out = _grouped(weights.to(value.dtype), value.shape[1]) @ value
    return out.view(*logits.shape[:3], -1).to(logits.dtype), lse


def _slopes(
    ctx: Any, piece: Piece, q: Tensor, block: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor,
    sums: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of one piece to grad_q (rows, H, t, D) and sums (rows, K, t, D + E)."""
    at, dtype, heads = piece.queries, q.dtype, block.shape[1]
    key, value = _keys_values(block, piece, ctx.values, q.shape[-1])
    logits, slope = _scored(q[:, :, at], key, piece, ctx.scale, ctx.softcap)
    norm = lse[:, :, at]
    weights = (logits - norm.masked_fill(norm == float("-inf"), 0.0)).exp()  # (rows, H, b, keys)
    out = _grouped(grad[:, :, at], heads)  # (rows, K, G * b, E)
    lean = (out @ value.transpose(-1, -2)).view(weights.shape) - delta[:, :, at]
    dscores = weights * lean * ctx.scale
    if slope is not None:
        dscores = dscores * slope
    dscores = _grouped(dscores.to(dtype), heads)  # (rows, K, G * b, keys)
    grad_q[:, :, at] += (dscores @ key).view(*grad_q[:, :, at].shape)
    mine = sums[:, :, piece.keys]
    mine[..., : q.shape[-1]] += dscores.transpose(-1, -2) @ _grouped(q[:, :, at], heads)
    mine[..., ctx.values] += _grouped(weights.to(dtype), heads).transpose(-1, -2) @ out


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(rows, heads, b, …) -> (rows, kv_heads, G * b, …): the query heads of one key head as rows of one matrix."""
    return x.reshape(len(x), kv_heads, -1, x.shape[-1])
