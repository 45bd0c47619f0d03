"""Softmax attention one block of queries at a time: the exact result, batched matrix products, a backward by hand.

    O = softmax(scale * Q K^T + bias) V

On a CPU the tiles of the fused SDPA kernel are too small for its matrix units; products over all heads of a block of
queries are not, and a causal block needs no key past its own end. Two Zen 5 cores, forward and backward, bf16,
16 rows x 8 heads x 256 x 32: SDPA 41 ms, whole rows 15 ms, blocks of 128 12.7 ms; 4 x 12 x 512 x 64: 92, 27, 22 ms.
The price is memory: the probabilities are kept for the backward, O(T^2). `worth_it` says when to take it.

`kernels.train_attention` does the same without that price, and 2 to 3 times faster on a CPU with matrix units, because
products, softmax and slopes meet in the cache: it is taken where it can be built.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hanlin.kernels import train_attention

LARGEST = 1 << 27  # bytes of probabilities a layer may keep


def worth_it(q: Tensor) -> bool:
    """Whether block attention is the faster exact form for q (rows, heads, T, D): on a CPU, with the kernel or while
    T^2 is affordable."""
    rows, heads, length, _ = q.shape
    affordable = rows * heads * length * length * q.element_size() <= LARGEST
    return q.device.type == "cpu" and (affordable or train_attention.usable(q))


def block_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, *, causal: bool) -> Tensor:
    """q (rows, heads, T, D), k and v (rows, kv_heads, T, D) -> (rows, heads, T, D).

    v may be of another width, which is then the result's. bias: added to the scaled scores, (rows or 1, heads or 1, T,
    T), or None; no gradient flows to it. causal: no query sees a later key; with a bias, the
    bias must say so too (it is then used to skip work only).
    """
    if train_attention.usable(q):
        places = [train_attention.laid_out(x.transpose(1, 2).to(q.dtype)) for x in (q, k, v)]
        bias = None if bias is None else bias.to(q.dtype).expand(-1, -1, q.shape[2], -1).contiguous()
        return _KernelAttention.apply(*places, bias, scale, causal).transpose(1, 2)
    rows, heads, length, width = q.shape
    groups = heads // k.shape[1]
    grouped = q.reshape(rows * k.shape[1], groups, length, width)
    flat_k, flat_v = k.reshape(-1, length, width), v.reshape(-1, length, v.shape[-1])
    if bias is not None and bias.shape[1] > 1:  # by head: (rows or 1, heads, T, T) stands as the scores do
        bias = bias.expand(rows, -1, -1, -1)
    return _BlockAttention.apply(grouped, flat_k, flat_v, bias, scale, causal).view(rows, heads, length, v.shape[-1])


class _KernelAttention(torch.autograd.Function):
    """q (rows, T, heads, D), k and v (rows, T, kv_heads, ...) -> (rows, T, heads, width of v)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
        shape = train_attention.shape_of(q, k, v, bias, scale, causal=causal)
        out, norms = train_attention.attend(q, k, v, bias, shape)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, bias, out, norms)
            ctx.shape = shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, norms = ctx.saved_tensors
        found = train_attention.attend_backward(q, k, v, bias, ctx.shape, out, norms, gradients[0])
        return *found, None, None, None


class _BlockAttention(torch.autograd.Function):
    """Shapes: N = rows * kv_heads, G = query heads a key head, b = queries of a block, e = keys they may see."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
    ) -> Tensor:  # q (N, G, T, D), k and v (N, T, D)
        N, G, T, D = q.shape
        block = min(T, 128 if q.dtype == torch.bfloat16 else 64)
        out = q.new_empty(N, G, T, v.shape[-1])
        queries, probabilities = [], []
        future = torch.full((block, block), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        for start, stop, end in _blocks(T, block, causal):
            b = stop - start
            part = q[:, :, start:stop].reshape(N, G * b, D).mul(scale)
            scores = torch.bmm(part, k[:, :end].transpose(1, 2))  # (N, G*b, e)
            if bias is not None:
                scores.view(len(bias), -1, b, end).add_(bias[:, :, start:stop, :end])
            elif causal:
                scores.view(N * G, b, end)[:, :, start:].add_(future[:b, :b])
            probability = torch.softmax(scores, -1)
            out[:, :, start:stop] = torch.bmm(probability, v[:, :end]).view(N, G, b, -1)
            queries.append(part)
            probabilities.append(probability)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(k, v, *queries, *probabilities)
            ctx.scale, ctx.causal, ctx.block = scale, causal, block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        k, v, *saved = ctx.saved_tensors
        queries, probabilities = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        N, G, T, width = grad.shape
        D = k.shape[-1]
        grad_q, grad_k, grad_v = grad.new_empty(N, G, T, D), torch.zeros_like(k), torch.zeros_like(v)
        for index, (start, stop, end) in enumerate(_blocks(T, ctx.block, ctx.causal)):
            b, probability = stop - start, probabilities[index]
            part = grad[:, :, start:stop].reshape(N, G * b, width)
            grad_v[:, :end] += torch.bmm(probability.transpose(1, 2), part)
            slope = torch.bmm(part, v[:, :end].transpose(1, 2))
            slope = torch._softmax_backward_data(slope, probability, -1, probability.dtype)
            grad_q[:, :, start:stop] = torch.bmm(slope, k[:, :end]).view(N, G, b, D)
            grad_k[:, :end] += torch.bmm(slope.transpose(1, 2), queries[index])
        return grad_q.mul_(ctx.scale), grad_k, grad_v, None, None, None


def _blocks(length: int, block: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, past the last query, past the last key) of each block."""
    starts = range(0, length, block)
    return [(s, min(s + block, length), min(s + block, length) if causal else length) for s in starts]
