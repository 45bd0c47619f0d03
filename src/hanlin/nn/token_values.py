"""Several numbers a token from its logits, such as log-probability and entropy, without ever holding all logits.

    values_t = f(z_t, ...)        z = softcap(scale * (h W^T + b))        one row of f for each token

`nn.chunked_head` sums a loss and makes its slope in the same visit. Where the loss couples tokens (a ratio of whole
sequences, a pair of answers) the slope is not known before all values are, so backward makes the logits of a chunk once
more: four products through the head instead of three, and memory for one chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hanlin.core.errors import HanlinError
from hanlin.nn.chunked_head import Head, rows_per_chunk, wide_dtype

Values = Callable[..., Tensor]  # (z (n, vocabulary), *rows (n, ...)) -> (n, k); may overwrite z
Slope = Callable[..., Tensor]  # (z, gradient (n, k), *rows) -> d/dz (n, vocabulary); may overwrite z


def token_logprobs_and_entropy(
    hidden: Tensor, head: Head, ids: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log softmax(z / temperature)[id] and the entropy of that distribution, both with gradient.

    hidden (n, width): what each token was predicted from; ids (n,) -> (n,) fp32 (fp64 for fp64), and (n,) or None.
    """
    if not temperature > 0:
        raise HanlinError(f"`temperature` is {temperature}; log-probabilities need a positive one.")

    def values(z: Tensor, target: Tensor) -> Tensor:
        if temperature != 1:
            z.div_(temperature)
        at_target = z.gather(-1, target[:, None]).squeeze(-1)
        norm = z.logsumexp(-1)
        if not entropy:
            return (at_target - norm)[:, None]
        mean = z.mul_((z - norm[:, None]).exp_()).sum(-1)
        return torch.stack([at_target - norm, norm - mean], -1)

    def slope(z: Tensor, gradient: Tensor, target: Tensor) -> Tensor:
        if temperature != 1:
            z.div_(temperature)
        log_p = z.sub_(z.logsumexp(-1, keepdim=True))
        of_logp = gradient[:, :1]
        if entropy:
            p = log_p.exp()
            spread = -(p * log_p).sum(-1, keepdim=True)
            out = p.mul_(-of_logp - gradient[:, 1:] * (log_p + spread))
        else:
            out = log_p.exp_().mul_(-of_logp)
        out.scatter_add_(-1, target[:, None], of_logp)
        return out.div_(temperature) if temperature != 1 else out

    found = values_through_head(hidden, head, values, ids, slope=slope)
    return found[:, 0], found[:, 1] if entropy else None


def values_through_head(
    hidden: Tensor, head: Head, values: Values, *rows: Tensor, slope: Slope | None = None, chunk: int | None = None
) -> Tensor:
    """values(logits (n, vocabulary), *rows (n, ...)) -> (n, k) of every token, a chunk at a time.

    hidden (n, width); rows carry no gradient. slope(logits, gradient (n, k), *rows) -> gradient of the logits; None:
    by autograd. -> (n, k) fp32 (fp64 for fp64), with a gradient for the hidden states and the head.
    """
    if hidden.ndim != 2 or hidden.shape[-1] != head.weight.shape[1]:
        raise HanlinError(f"Hidden states {list(hidden.shape)} do not fit a head {list(head.weight.shape)}.")
    if any(row.requires_grad for row in rows):
        raise HanlinError("`values_through_head` has a gradient for hidden states and head only; detach the others.")
    chunk = chunk or rows_per_chunk(len(head.weight))
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _ValuesThroughHead.apply(hidden, weight, bias, head, (values, slope or _slope_of(values)), rows, chunk)


def logits_through_head(hidden: Tensor, head: Head) -> Tensor:
    """The logits of a few tokens, without gradient: hidden (n, width) -> (n, vocabulary) fp32 (fp64 for fp64)."""
    return _logits(hidden.detach(), head.weight.detach().to(hidden.dtype), head.bias, head)[0]


def _slope_of(values: Values) -> Slope:
    def slope(z: Tensor, gradient: Tensor, *rows: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad(values(leaf * 1.0, *rows), leaf, gradient)[0]

    return slope


class _ValuesThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, functions: tuple[Values, Slope],
        rows: tuple[Tensor, ...], chunk: int,
    ) -> Tensor:  # fmt: skip
        matrix = weight.to(hidden.dtype)
        found = [
            functions[0](_logits(part, matrix, bias, head)[0], *parts)
            for part, *parts in _chunks((hidden, *rows), chunk)
        ]
        ctx.save_for_backward(hidden, weight, bias, *rows)
        ctx.head, ctx.slope, ctx.chunk = head, functions[1], chunk
        return torch.cat(found) if found else hidden.new_zeros(0, 2, dtype=wide_dtype(hidden))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *rows = ctx.saved_tensors
        head, wide = ctx.head, wide_dtype(hidden)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if need_bias else None
        at = 0
        for part, gradient, *parts in _chunks((hidden, gradients[0], *rows), ctx.chunk):
            z, damping = _logits(part, matrix, bias, head)
            slope = ctx.slope(z, gradient.to(wide), *parts)
            if damping is not None:
                slope = slope.mul_(damping)
            if head.scale != 1:
                slope = slope * head.scale
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            narrow = slope.to(part.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, matrix, out=grad_hidden[at : at + len(part)])
            if grad_weight is not None:
                if wide == part.dtype:
                    torch.addmm(grad_weight, narrow.T, part, out=grad_weight)
                else:
                    grad_weight += narrow.T @ part
            at += len(part)
        made = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return (*made, None, None, None, None)


def _logits(part: Tensor, matrix: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """Logits of a few tokens, wide and free to be overwritten, and the slope of the soft-cap if there is one."""
    z = part @ matrix.T
    if bias is not None:
        z += bias.detach().to(z.dtype)
    z = z.to(wide_dtype(part))
    if head.scale != 1:
        z *= head.scale
    if head.softcap is None:
        return z, None
    z.div_(head.softcap).tanh_()
    damping = 1 - z * z
    return z.mul_(head.softcap), damping


def _chunks(tensors: tuple[Tensor, ...], chunk: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(chunk) for tensor in tensors), strict=True)) if len(tensors[0]) else []
