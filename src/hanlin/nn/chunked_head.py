"""Any token loss through the output head, without ever holding all logits.

    z = softcap(scale * (h W^T + b))        loss = sum over tokens of f(z)        s = df/dz, for a few tokens at a time

With a vocabulary V and N tokens the logits are N x V numbers, and plain autograd keeps them two or three times. Here a
chunk of tokens goes through the head, its slope s is made at once, and from it s W (for the hidden states) and s^T h
(for the head, added up). Forward and backward are one visit and three matrix products; the backward pass only
multiplies what is there by the gradient that arrives.

Why a chunk is as long as it is (`rows_per_chunk`): every chunk adds to the whole gradient of W, a pass over V x width
numbers, so few long chunks are fast; its logits must live, so short chunks are small.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hanlin.core.errors import HanlinError
from hanlin.kernels.training import widen

Slope = Callable[..., tuple[Tensor, Tensor | None]]  # (z, *rows, wanted) -> (sum, df/dz); may overwrite z
Narrow = Callable[..., tuple[Tensor, Tensor | None] | None]

MOST_ROWS = 512  # as fast as 1,024 (V = 8,192 and 16,384, fp32 and bf16), half the memory
LOGITS_OF_CHUNK = 2**26  # numbers: 256 MiB in fp32. V = 151,936: chunks of 256 to 1,024 rows take the same time


@dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits: weight (vocabulary, width) of any float dtype (cast to that of the hidden
    states), bias (vocabulary,); scale s and softcap c: c * tanh(s * (h W^T + b) / c) (Gemma 2, arXiv:2408.00118)."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise HanlinError(f"The weight of a head is (vocabulary, width); this one is {list(self.weight.shape)}.")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise HanlinError(
                f"The bias of a head over {len(self.weight)} tokens is ({len(self.weight)},); this one is "
                f"{list(self.bias.shape)}."
            )
        if self.softcap is not None and not self.softcap > 0:
            raise HanlinError(f"`softcap` is {self.softcap}; it must be positive, or None for none.")

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., width) -> (..., vocabulary), all of them, in fp32 (fp64 for fp64), without a gradient."""
        hidden = hidden.detach()
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = _product(flat, self.weight.detach().to(flat.dtype), self, None).to(wide_dtype(flat))
        if self.softcap is not None:
            out = out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out.view(*hidden.shape[:-1], -1)


def through_head(
    hidden: Tensor, head: Head, loss: Callable[..., Tensor], *rows: Tensor,
    keep: Tensor | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Sum over tokens of a loss of their logits, a chunk at a time.

    hidden (..., width); rows: tensors (..., any) that say more about each token; keep (...) bool: the tokens that
    count, None: all. loss(logits (n, vocabulary), *rows (n, any)) -> scalar sum, differentiable in the logits; the
    gradient goes to the hidden states and the head and nowhere else. -> fp32 scalar (fp64 for fp64 hidden).
    """
    if any(row.requires_grad for row in rows):
        raise HanlinError("`through_head` has a gradient for the hidden states and the head only; detach the others.")

    def slope(z: Tensor, *parts: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        if not wanted:
            return loss(z, *parts), None
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            total = loss(leaf, *parts)
            return total.detach(), torch.autograd.grad(total, leaf)[0]

    return slope_through_head(hidden, head, slope, *rows, keep=keep, chunk=chunk)


def slope_through_head(
    hidden: Tensor, head: Head, slope: Slope, *rows: Tensor,
    keep: Tensor | None = None, chunk: int | None = None, narrow: Narrow | None = None,
) -> Tensor:  # fmt: skip
    """`through_head` for a loss that makes its slope itself: slope(z, *rows, wanted=bool) -> (sum, slope or None).

    narrow: the same of logits as the product left them, in its dtype; it may return None, and then `slope` gets them
    widened. Not asked where there is a soft-cap.
    """
    if hidden.shape[-1] != head.weight.shape[1]:
        raise HanlinError(f"Hidden states {list(hidden.shape)} do not fit a head {list(head.weight.shape)}.")
    for row in (*rows, *(() if keep is None else (keep,))):
        if row.shape[: hidden.ndim - 1] != hidden.shape[:-1]:
            raise HanlinError(f"Hidden states {list(hidden.shape)} and {list(row.shape)} are not of the same tokens.")
    if chunk is None:
        chunk = rows_per_chunk(len(head.weight))
    elif chunk < 1:
        raise HanlinError(f"`chunk` is {chunk}; it is how many tokens are taken at a time, at least 1.")
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # inside, a parameter would still say that it wants its gradient
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _ThroughHead.apply(hidden, weight, bias, head, (slope, narrow), rows, keep, chunk)


def rows_per_chunk(vocabulary: int) -> int:
    """How many tokens go through a head of this vocabulary at a time."""
    rows = min(MOST_ROWS, LOGITS_OF_CHUNK // max(vocabulary, 1))
    return rows // 32 * 32 or 32


def wide_dtype(like: Tensor) -> torch.dtype:
    """What a softmax is computed in."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head,
        slopes: tuple[Slope, Narrow | None],
        extras: tuple[Tensor, ...], keep: Tensor | None, chunk: int,
    ) -> Tensor:  # fmt: skip
        rows = hidden.reshape(-1, hidden.shape[-1])
        extras = tuple(extra.flatten(0, hidden.ndim - 2) if hidden.ndim > 2 else extra for extra in extras)
        if keep is not None:
            keep = keep.reshape(-1)
            if bool(keep.all()):
                keep = None
            else:  # tokens that do not count cost nothing
                rows, extras = rows[keep], tuple(extra[keep] for extra in extras)
        matrix, wide = weight.to(rows.dtype), wide_dtype(rows)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wanted = need_hidden or need_weight or need_bias
        total = torch.zeros((), dtype=wide, device=rows.device)
        grad_rows = torch.empty_like(rows) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if need_bias else None
        length = min(chunk, len(rows))
        product = rows.new_empty(length, len(weight))  # for all chunks: a new one would be paged in each time
        wider = product if wide == rows.dtype else None
        slope_of, narrow = slopes
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            low, damping = product[: len(part)], None
            _product(part, matrix, head, low)
            parts = [extra[start : start + chunk] for extra in extras]
            found = None if narrow is None or head.softcap is not None else narrow(low, *parts, wanted=wanted)
            if found is None:
                if wider is None:
                    wider = product.new_empty(product.shape, dtype=wide)
                z = wider[: len(part)]
                if z.dtype != low.dtype:
                    z.copy_(low)
                if head.softcap is not None:
                    z.div_(head.softcap).tanh_()
                    damping = 1 - z * z
                    z.mul_(head.softcap)
                found = slope_of(z, *parts, wanted=wanted)
            value, slope = found
            total += value
            if slope is None:
                continue
            if damping is not None:
                slope = slope.mul_(damping)
            if grad_bias is not None:
                grad_bias.add_(slope.sum(0, dtype=wide), alpha=head.scale)
            if slope.dtype != low.dtype:
                slope = low.copy_(slope)
            if grad_rows is not None:
                _scaled_product(slope, matrix, head.scale, grad_rows[start : start + chunk])
            if grad_weight is not None:
                if wide == rows.dtype:  # adds in place
                    torch.addmm(grad_weight, slope.T, part, alpha=head.scale, out=grad_weight)
                else:
                    made = _scaled_product(slope.T, part, head.scale, None)
                    if not widen(made, grad_weight, add=True):
                        grad_weight.add_(made)
        if grad_rows is not None and keep is not None:
            grad_rows = rows.new_zeros(len(keep), rows.shape[-1]).index_put_((keep,), grad_rows)
        ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        ctx.shape = hidden.shape
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        again = _graph_is_kept()
        made = [None if made is None else (made * grad if again else made.mul_(grad)) for made in ctx.saved_tensors]
        found = [None if g is None else g.to(dtype) for g, dtype in zip(made, ctx.dtypes, strict=True)]
        if found[0] is not None:
            found[0] = found[0].view(ctx.shape)
        return (*found, None, None, None, None, None)


def _product(part: Tensor, matrix: Tensor, head: Head, out: Tensor | None) -> Tensor:
    """scale * (part matrix^T + bias) as one product."""
    if head.bias is None:
        return _scaled_product(part, matrix.T, head.scale, out)
    bias = head.bias.detach().to(part.dtype)
    return torch.addmm(bias, part, matrix.T, beta=head.scale, alpha=head.scale, out=out)


def _scaled_product(a: Tensor, b: Tensor, scale: float, out: Tensor | None) -> Tensor:
    if scale == 1:
        return torch.mm(a, b, out=out)
    return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=scale, out=out)


def _graph_is_kept() -> bool:
    """Whether this backward may run again (`retain_graph`). If not, what the forward pass made is given away and scaled
    in place; a copy of a large head's gradient would be the peak of the whole step."""
    ask = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
