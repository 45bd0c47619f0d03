"""A vocabulary that is cut over the ranks (Megatron-LM, arXiv:1909.08053, section 3): its rows in the embedding, its
columns in the logits, and a loss that never gathers them.

    -log softmax(z)[y] = log( sum over ranks of sum_v exp(z_v - m) ) + m - z_y        m = max over ranks of max_v z_v

For a batch of b tokens the loss exchanges 3 b numbers, a gathered head b V.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.models.tensor_plan import share
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import IGNORE
from hanlin.parallel.collectives import Group, all_sum, copy_in, place, sum_out


class VocabularyEmbedding(nn.Embedding):
    """The rows [start, start + len(weight)) of a table. Each rank looks up the tokens that it has and gives zeros for
    the others; the sum over the ranks is exact."""

    def __init__(self, weight: Tensor, start: int, group: Group) -> None:
        rows, width = weight.shape
        super().__init__(rows, width, device="meta")
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self._start, self._group = start, group

    def forward(self, input: Tensor) -> Tensor:  # (...) -> (..., width)
        local = input - self._start
        absent = (local < 0) | (local >= self.num_embeddings)
        rows = F.embedding(local.masked_fill(absent, 0), self.weight)
        return sum_out(rows.masked_fill(absent[..., None], 0.0), self._group)


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
    return _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), start, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, start: int, group: Group) -> Tensor:
        z = logits if logits.dtype == torch.float64 else logits.float()  # (n, V / ranks)
        shift = z.amax(-1)
        dist.all_reduce(shift, op=dist.ReduceOp.MAX, group=group)
        local, keep = targets - start, targets != IGNORE
        mine = (local >= 0) & (local < z.shape[-1])
        local = local.masked_fill(~mine, 0)[:, None]
        at_target = z.gather(-1, local).squeeze(-1).masked_fill(~mine, 0.0)
        probability = (z - shift[:, None]).exp_()
        norm, at_target = all_sum(torch.stack([probability.sum(-1), at_target]), group)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(probability.div_(norm[:, None]), local, mine, keep)
        return (norm.log() + shift - at_target).masked_fill(~keep, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        probability, local, mine, keep = ctx.saved_tensors
        slope = probability.scatter_add(-1, local, -mine.to(probability.dtype)[:, None])
        return (slope * (keep * gradients[0])[:, None]).to(ctx.dtype), None, None, None
