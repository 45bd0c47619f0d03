"""FlashAttention in plain PyTorch: exact attention, tile by tile, without ever holding a T x T matrix.

The softmax of a row is found online (arXiv:1805.02867). Over the tiles seen so far keep the maximum m, the sum
l = sum exp(s - m) and the unnormalised output a = sum exp(s - m) v. A new tile with scores S changes them to

    m' = max(m, max S)    l' = l e^(m - m') + sum e^(S - m')    a' = a e^(m - m') + e^(S - m') V

and at the end o = a / l, L = m + log l. The backward pass (arXiv:2205.14135, algorithm 4) keeps only o and L, makes
each tile of probabilities again, P = e^(S - L), and needs of the softmax's Jacobian one number a query: delta = do . o.

    dV += P^T do    dS = P * (do V^T - delta)    dQ += scale dS K    dK += scale dS^T Q

This file is for reading and for checking kernels: it is exact, not fast. `PeakBytes` shows what it is for.
"""

from collections.abc import Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hanlin.core.errors import HanlinError
from hanlin.nn.masks import Bidirectional, Mask, hides_the_future


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, scale: float | None = None, block: int = 64
) -> Tensor:
    """softmax(scale q k^T, where visible) v, forward and backward in O(T) memory.

    q (rows, heads, T, D), k (rows, kv_heads, L, D), v (rows, kv_heads, L, E), kv_heads dividing heads
    -> (rows, heads, T, E). mask: any `Mask`, asked tile by tile; default: every query sees every key. scale: default
    D^-1/2. block: the side of a tile. A query that sees no key has output 0 and gradient 0.
    """
    rows, heads, length, _ = q.shape
    fits = k.shape[:3] == v.shape[:3] and k.shape[0] == rows and k.shape[3] == q.shape[3]
    if not fits or heads % k.shape[1]:
        raise HanlinError(
            f"Found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected q (rows, heads, T, D), "
            "k (rows, kv_heads, L, D), v (rows, kv_heads, L, E) with heads a multiple of kv_heads."
        )
    if block < 1:
        raise HanlinError(f"block is {block}, expected at least 1 query a tile.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.reshape(rows, k.shape[1], -1, length, q.shape[-1])  # (rows, kv_heads, G, T, D)
    out = _Flash.apply(grouped, k[:, :, None], v[:, :, None], mask or Bidirectional(), scale, block)
    return out.reshape(rows, heads, length, v.shape[-1])


class _Flash(torch.autograd.Function):
    """Shapes: q (rows, K, G, T, D), k (rows, K, 1, L, D), v (rows, K, 1, L, E); b queries and c keys a tile."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, block: int) -> Tensor:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32  # sums of many small numbers
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        logsum = q.new_empty(q.shape[:-1], dtype=wide)
        for queries in _tiles(q.shape[-2], block):
            part = q[..., queries, :].to(wide) * scale
            top = part.new_full(part.shape[:-1], float("-inf"))  # m (rows, K, G, b)
            total = torch.zeros_like(top)  # l
            sums = part.new_zeros(*part.shape[:-1], v.shape[-1])  # a (rows, K, G, b, E)
            for keys, visible in _visible_tiles(mask, queries, k.shape[-2], block, q.device):
                scores = (part @ k[..., keys, :].to(wide).mT).masked_fill_(~visible, float("-inf"))  # (…, b, c)
                new_top = torch.maximum(top, scores.amax(-1))
                origin = new_top.masked_fill(new_top == float("-inf"), 0.0)  # nothing seen yet: no inf - inf
                old, weights = (top - origin).exp(), (scores - origin[..., None]).exp()
                total = total * old + weights.sum(-1)
                sums = sums * old[..., None] + weights @ v[..., keys, :].to(wide)
                top = new_top
            blind = total == 0
            out[..., queries, :] = (sums / total.masked_fill(blind, 1.0)[..., None]).to(q.dtype)
            # finite where nothing was seen: in the backward pass e^(-inf - L) is then 0 and not NaN
            logsum[..., queries] = (top + total.log()).masked_fill(blind, 0.0)
        ctx.save_for_backward(q, k, v, out, logsum)
        ctx.mask, ctx.scale, ctx.block = mask, scale, block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        q, k, v, out, logsum = ctx.saved_tensors
        wide = logsum.dtype
        grad_q = torch.zeros_like(q, dtype=wide)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for queries in _tiles(q.shape[-2], ctx.block):
            part, slope = q[..., queries, :].to(wide) * ctx.scale, grad[..., queries, :].to(wide)
            delta = (slope * out[..., queries, :].to(wide)).sum(-1, keepdim=True)  # (…, b, 1)
            for keys, visible in _visible_tiles(ctx.mask, queries, k.shape[-2], ctx.block, q.device):
                key, value = k[..., keys, :].to(wide), v[..., keys, :].to(wide)
                scores = (part @ key.mT).masked_fill_(~visible, float("-inf"))
                probability = (scores - logsum[..., queries, None]).exp()  # (…, b, c)
                dscores = probability * (slope @ value.mT - delta)
                # the query heads of one key head add up
                grad_v[..., keys, :] += (probability.mT @ slope).sum(2, keepdim=True)
                grad_k[..., keys, :] += (dscores.mT @ part).sum(2, keepdim=True)
                grad_q[..., queries, :] += dscores @ key * ctx.scale
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _tiles(length: int, block: int) -> Iterator[slice]:
    for start in range(0, length, block):
        yield slice(start, min(start + block, length))


def _visible_tiles(
    mask: Mask, queries: slice, keys: int, block: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """The tiles of keys that some query of the tile sees, each with who sees what: (rows or 1, 1, 1, b, c) bool."""
    index = torch.arange(queries.start, queries.stop, device=device)
    end = min(keys, queries.stop) if hides_the_future(mask) else keys
    for tile in _tiles(end, block):
        visible = mask.dense(index, torch.arange(tile.start, tile.stop, device=device))
        if visible.any():
            yield tile, visible[:, None, None]


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the `with` block: `now` alive, `peak` the most at once.

    What existed before is not counted, nor is scratch memory inside a single operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[ref, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in before:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        handle = ref(storage, self._free)
        if handle not in self._alive:
            self._alive[handle] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _free(self, handle: ref) -> None:
        self.now -= self._alive.pop(handle)
