"""A vocabulary that is cut over the ranks (Megatron-LM, arXiv:1909.08053, section 3): its rows in the embedding, its
columns in the logits, and losses that never gather them.

    -log softmax(z)[y] = L - z_y        L = log( sum over ranks of sum_v exp(z_v - m) ) + m,  m = max over ranks of z

`vocabulary_parallel_loss` and `vocabulary_parallel_token_sums` take a chunk of tokens at a time through the head, so
that a rank never holds its logits of all tokens. For n trained tokens they exchange 3 n numbers in fp32 (fp64 for
fp64): n maxima and 2 n sums, each in one call a chunk of `rows_per_chunk(ceil(V / ranks))` tokens; backward sums the
gradient of the hidden states, of all tokens that were given. A gathered head would exchange n V numbers.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hanlin.core.errors import HanlinError
from hanlin.models.tensor_plan import share
from hanlin.models.transformer import Transformer
from hanlin.nn.chunked_head import Head, rows_per_chunk, slope_through_head, wide_dtype
from hanlin.nn.losses import IGNORE
from hanlin.parallel.collectives import Group, all_sum, copy_in, place, sum_out
from hanlin.parallel.sequence import TokenShares


class VocabularyEmbedding(nn.Embedding):
    """The rows [start, start + len(weight)) of a table. Each rank looks up the tokens that it has and gives zeros for
    the others; the sum over the ranks is exact. tokens: with sequence parallelism, each gets that of its own tokens."""

    def __init__(self, weight: Tensor, start: int, group: Group, tokens: TokenShares | None = None) -> None:
        rows, width = weight.shape
        super().__init__(rows, width, device="meta")
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self._start, self._group, self._tokens = start, group, tokens

    def forward(self, input: Tensor) -> Tensor:  # (...) -> (..., width)
        local = input - self._start
        absent = (local < 0) | (local >= self.num_embeddings)
        rows = F.embedding(local.masked_fill(absent, 0), self.weight)
        rows = rows.masked_fill(absent[..., None], 0.0)
        if self._tokens is None:
            return sum_out(rows, self._group)
        self._tokens.length = input.shape[-1]
        return self._tokens.scatter(rows)


@dataclass(frozen=True)
class Columns:
    """Which of the `vocabulary` tokens this rank's head gives logits of: [start, stop). widest: most of any rank."""

    vocabulary: int
    start: int
    stop: int
    widest: int
    group: Group

    @classmethod
    def of(cls, vocabulary: int, group: Group) -> "Columns":
        rank, ranks = place(group)
        return cls(vocabulary, *share(vocabulary, rank, ranks), -(-vocabulary // ranks), group)

    def check(self, head: Head, targets: Tensor) -> None:
        """`HanlinError` for a head that has not these tokens, `IndexError` (looked at on CPUs) for a target that nobody
        has."""
        if len(head.weight) != self.stop - self.start:
            raise HanlinError(
                f"This rank has the tokens {self.start} … {self.stop - 1} of {self.vocabulary}; its head has "
                f"{len(head.weight)} rows."
            )
        _check_targets(targets, self.vocabulary)


def vocabulary_parallel_loss(
    hidden: Tensor, head: Head, targets: Tensor, vocabulary: int, group: Group = None, *, chunk: int | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(z)[target], z the logits of the ranks' heads side by side: equal on every rank.

    hidden (..., width), the same on every rank; head: this rank's rows of the output matrix and its bias, soft-cap and
    scale; targets (...) of the whole vocabulary, `IGNORE` where there is no loss -> fp32 scalar (fp64 for fp64). Its
    gradient goes to the hidden states (whole) and to this rank's rows. Forward and backward are one visit
    (`nn.chunked_head`).
    """
    columns = Columns.of(vocabulary, group)
    columns.check(head, targets)
    slope = partial(_slope, columns=columns)
    chunk = chunk or rows_per_chunk(columns.widest)
    return slope_through_head(copy_in(hidden, group), head, slope, targets, keep=targets != IGNORE, chunk=chunk)


def vocabulary_parallel_token_sums(
    hidden: Tensor, head: Head, targets: Tensor, vocabulary: int, group: Group = None, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `vocabulary_parallel_loss`: (the same sum, sum over the trained tokens of L^2), for a z-loss."""
    columns = Columns.of(vocabulary, group)
    columns.check(head, targets)
    return _token_sums(copy_in(hidden, group), head, targets, columns, chunk)


def token_sums(hidden: Tensor, head: Head, targets: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """(sum of cross-entropies, sum over the trained tokens of log(sum exp z)^2) of a whole head, each with its gradient
    (z-loss: PaLM, arXiv:2204.02311, section 5). The logits are made twice, forward and backward."""
    _check_targets(targets, len(head.weight))
    return _token_sums(hidden, head, targets, None, chunk)


def shard_logits(model: Transformer, hidden: Tensor, group: Group = None) -> Tensor:
    """hidden (..., width), of a model that `parallel.shard` cut -> this rank's columns of the logits (..., V / ranks),
    what `vocabulary_parallel_cross_entropy` takes."""
    if model.part is None or model.lm_head is None:
        raise HanlinError("Logits of a shard are asked of a model that `parallel.shard` cut, with an output head.")
    x, head, said = copy_in(model.head_hidden(hidden), group), model.lm_head, model.config.head
    out = F.linear(x, head.weight.to(x.dtype), None if head.bias is None else head.bias.to(x.dtype))
    if said is not None and said.scale != 1:
        out = out * said.scale
    return out if said is None or said.softcap is None else torch.tanh(out / said.softcap) * said.softcap


def vocabulary_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocabulary: int, group: Group = None) -> Tensor:
    """Sum over tokens of -log softmax(z)[target], z the ranks' logits side by side; equal on every rank.

    logits (..., V / ranks): this rank's; targets (...): of the whole vocabulary, `IGNORE` where there is no loss;
    vocabulary: V -> fp32 scalar (fp64 for fp64 logits).
    """
    rank, ranks = place(group)
    start, stop = share(vocabulary, rank, ranks)
    if logits.shape[-1] != stop - start or logits.shape[:-1] != targets.shape:
        raise HanlinError(
            f"Rank {rank} of {ranks} has the tokens {start} … {stop - 1} of {vocabulary}; it got logits of "
            f"{list(logits.shape)} and targets of {list(targets.shape)}."
        )
    return _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), Columns.of(vocabulary, group))


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if targets.is_cpu:  # a GPU would wait
        wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= vocabulary))]
        if len(wrong):
            raise IndexError(f"a target of {int(wrong[0])}, but there are {vocabulary} tokens")


def _normaliser(z: Tensor, targets: Tensor, columns: Columns | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z (n, V / ranks), targets (n,) -> of all ranks: L (n,), z at the target (n,); of this one: the target's column
    (n, 1), whether it is here (n, 1)."""
    shift = z.amax(-1)
    if columns is not None:
        dist.all_reduce(shift, op=dist.ReduceOp.MAX, group=columns.group)
    local = targets if columns is None else targets - columns.start
    mine = (local >= 0) & (local < z.shape[-1])
    local = local.masked_fill(~mine, 0)[:, None]
    at_target = z.gather(-1, local)[:, 0].masked_fill(~mine, 0.0)
    norm = (z - shift[:, None]).exp_().sum(-1)
    if columns is not None:
        norm, at_target = all_sum(torch.stack([norm, at_target]), columns.group)
    return norm.log() + shift, at_target, local, mine[:, None]


def _slope(z: Tensor, targets: Tensor, *, wanted: bool, columns: Columns) -> tuple[Tensor, Tensor | None]:
    """Sum of L - z_y and its slope in z, softmax - [y], in the memory of z."""
    log_norm, at_target, local, mine = _normaliser(z, targets, columns)
    total = (log_norm - at_target).sum()
    if not wanted:
        return total, None
    return total, z.sub_(log_norm[:, None]).exp_().scatter_add_(-1, local, -mine.to(z.dtype))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, columns: Columns) -> Tensor:
        z = logits if logits.dtype == torch.float64 else logits.float()  # (n, V / ranks)
        keep = targets != IGNORE
        log_norm, at_target, local, mine = _normaliser(z, targets, columns)
        ctx.dtype = logits.dtype
        ctx.save_for_backward((z - log_norm[:, None]).exp_(), local, mine, keep)
        return (log_norm - at_target).masked_fill(~keep, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        probability, local, mine, keep = ctx.saved_tensors
        slope = probability.scatter_add(-1, local, -mine.to(probability.dtype))
        return (slope * (keep * gradients[0])[:, None]).to(ctx.dtype), None, None


def _token_sums(
    hidden: Tensor, head: Head, targets: Tensor, columns: Columns | None, chunk: int | None
) -> tuple[Tensor, Tensor]:
    if targets.shape != hidden.shape[:-1] or hidden.shape[-1] != head.weight.shape[1]:
        raise HanlinError(
            f"Hidden states {list(hidden.shape)}, targets {list(targets.shape)} and a head {list(head.weight.shape)} "
            "do not fit each other."
        )
    chunk = chunk or rows_per_chunk(len(head.weight) if columns is None else columns.widest)
    keep = targets.flatten() != IGNORE
    rows, targets = hidden.flatten(0, -2)[keep], targets.flatten()[keep]
    return _TokenSums.apply(rows, head.weight, head.bias, head, targets, columns, chunk)


class _TokenSums(torch.autograd.Function):
    """Two sums, whose gradients are not known to be wanted in any proportion: backward makes the logits again, and with
    the L that forward kept it needs nothing of the other ranks."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, head: Head, targets: Tensor,
        columns: Columns | None, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        cost, log_norms = (rows.new_zeros(n, dtype=wide_dtype(rows)) for n in ((), len(rows)))
        for start in range(0, len(rows), chunk):
            here = slice(start, start + chunk)
            log_norm, at_target, _, _ = _normaliser(head.logits(rows[here]), targets[here], columns)
            cost += (log_norm - at_target).sum()
            log_norms[here] = log_norm
        ctx.how = head, columns, chunk
        ctx.save_for_backward(rows, weight, bias, targets, log_norms)
        return cost, log_norms.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, targets, log_norms = ctx.saved_tensors
        head, columns, chunk = ctx.how
        of_cost, of_square = gradients
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        matrix, wide = weight.to(rows.dtype), wide_dtype(rows)
        grad_rows = torch.empty_like(rows) if need_rows else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if need_bias else None
        for start in range(0, len(rows), chunk):
            here = slice(start, start + chunk)
            part, aim, log_norm = rows[here], targets[here], log_norms[here]
            z = head.logits(part)
            local = aim if columns is None else aim - columns.start
            mine = (local >= 0) & (local < z.shape[-1])
            slope = (z - log_norm[:, None]).exp_().mul_((of_cost + 2 * of_square * log_norm)[:, None])
            slope.scatter_add_(-1, local.masked_fill(~mine, 0)[:, None], -(mine * of_cost)[:, None])
            if head.softcap is not None:
                slope.mul_(1 - (z / head.softcap).square_())
            if head.scale != 1:
                slope.mul_(head.scale)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            low = slope.to(rows.dtype)
            if grad_rows is not None:
                torch.mm(low, matrix, out=grad_rows[here])
            if grad_weight is not None:
                grad_weight += low.T @ part
        made = (None if g is None else g.to(p.dtype) for g, p in ((grad_weight, weight), (grad_bias, bias)))
        return grad_rows, *made, None, None, None, None
