"""Token losses: tensors in, un-normalised sums out, no model inside. The trainer divides once, by what the objective
counted over the whole optimizer step, so accumulation, packing and sharding cannot change the result."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # a target that carries no loss (the value transformers uses too)


def count_targets(targets: Tensor) -> int:
    """How many targets carry loss: the denominator of a token-mean."""
    return int((targets != IGNORE).sum())


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 1024) -> Tensor:
    """Sum over tokens of -log softmax(hidden W^T)[target], without ever holding all logits.

    hidden (..., width), weight (vocabulary, width) any float dtype (cast to hidden's), targets (...) with `IGNORE`
    where there is no loss -> fp32 scalar (fp64 for fp64 hidden). Rows are taken `chunk` at a time: each chunk's logits
    live only as long as its loss and its gradient are computed, forward and backward in one visit.
    Chunks of 1,024 rows keep 8k-wide fp32 logits in the cache; see benchmarks/bench_train.py.
    """
    if not torch.is_grad_enabled():  # inside, a parameter would still say that it wants its gradient
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        labels = targets.reshape(-1)
        keep = labels != IGNORE
        everything = bool(keep.all())
        if not everything:  # untrained tokens cost nothing
            rows, labels = rows[keep], labels[keep]
        matrix = weight.to(rows.dtype)
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=rows.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(rows) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        for start in range(0, len(rows), chunk):
            part, label = rows[start : start + chunk], labels[start : start + chunk, None]
            logits = (part @ matrix.T).to(wide)
            shift = logits.amax(-1, keepdim=True)
            target = logits.gather(-1, label)
            probability = logits.sub_(shift).exp_()
            norm = probability.sum(-1, keepdim=True)
            total += (norm.log() + shift - target).sum()
            if grad_rows is None and grad_weight is None:
                continue
            slope = probability.div_(norm)
            slope.scatter_add_(-1, label, torch.full_like(target, -1.0))
            slope = slope.to(rows.dtype)
            if grad_rows is not None:
                torch.mm(slope, matrix, out=grad_rows[start : start + chunk])
            if grad_weight is not None:
                grad_weight += slope.T @ part
        if grad_rows is not None and not everything:
            grad_rows = rows.new_zeros(len(keep), rows.shape[-1]).index_put_((keep,), grad_rows)
        ctx.save_for_backward(grad_rows, grad_weight)
        ctx.shape, ctx.weight_dtype = hidden.shape, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        rows, weight = ctx.saved_tensors
        return (
            None if rows is None else (rows * grad.to(rows.dtype)).view(ctx.shape),
            None if weight is None else (weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits)[id] of each token: logits (..., vocabulary), ids (...) -> (...) fp32."""
    wide = logits.float()
    return wide.gather(-1, ids[..., None]).squeeze(-1) - wide.logsumexp(-1)
