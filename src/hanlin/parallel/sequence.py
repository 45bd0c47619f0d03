"""Sequence parallelism: between the cut blocks of a layer, each rank of a tensor group has its own tokens of every row
(Korthikanti et al., arXiv:2205.05198, section 4.2.2).

    own tokens --norm--▶ own tokens --gather--▶ all tokens ▶ its heads ▶ partial sums --scatter--▶ own tokens --▶ + …

A sum over the ranks is a reduce-scatter followed by an all-gather; here norms and residual sums stand between the two,
so they are computed and kept for 1 / n of the tokens, and nothing more is sent. Rank r has the r-th of n equal runs of
a row; where n does not divide the length T, zeros fill the last runs, and what they become is dropped again.

                forward             backward
    gather      all-gather          reduce-scatter      where own tokens enter a cut block
    scatter     reduce-scatter      all-gather          where partial sums leave it
    whole       all-gather          own tokens          the last hidden states: every rank has the same gradient of them
    share       own tokens          all-gather          its inverse
    pick        own tokens          zeros elsewhere     of what every rank computes, its own tokens
    once        all tokens          zeros elsewhere     into what every rank computes with one and the same gradient

Bytes a rank gives in one pass over `rows` rows: with t = ceil(T / n), b bytes an activation and S = rows * n * t *
width * b, each all-gather (its output) and each reduce-scatter (its input) counts S. A layer has

    forward     2 S gathered, 2 S scattered     attention, feed-forward or experts; a shared expert scatters S more,
                                                cross-attention gathers S and scatters S more
    backward    2 S gathered, 2 S scattered     as much more; and the gradient of each norm's parameters is summed, in
                                                the weights' dtype, once a backward

the embedding scatters S forward (in the dtype of its weights) and gathers S backward; the last norm's output is
gathered, S, with nothing backward; a module that predicts ahead gathers S forward and S backward besides. All sums of
`parallel.tensor` that are not of a block's input or output stay as they are. The gathered input of a block is kept for
its backward, not gathered again. Recomputed layers send what their forward sends once more.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.parallel.collectives import Group, all_gather, place, reduce_scatter


class TokenShares:
    """This rank's tokens of every row. length: tokens of a whole row in the pass at hand; the embedding and each layer
    say it before anything is moved."""

    def __init__(self, group: Group) -> None:
        self.group, self.length = group, 0
        self.rank, self.ranks = place(group)

    def count(self, length: int) -> int:
        """How many of a row's `length` tokens each rank has, fillers among them."""
        return -(-length // self.ranks)

    def gather(self, x: Tensor) -> Tensor:
        """(rows, t, width) -> (rows, T, width), which every rank's share reads: the gradient is a sum."""
        return _Move.apply(x, self, self.length, _all_gather, _reduce_scatter)

    def scatter(self, x: Tensor) -> Tensor:
        """The ranks' sum of x (rows, T, width) -> (rows, t, width)."""
        return _Move.apply(x, self, self.length, _reduce_scatter, _all_gather)

    def whole(self, x: Tensor) -> Tensor:
        """(rows, t, width) -> (rows, T, width), whose gradient is whole on every rank."""
        return _Move.apply(x, self, self.length, _all_gather, _own)

    def share(self, x: Tensor) -> Tensor:
        """x (rows, T, width), the same on every rank and so its gradient -> (rows, t, width)."""
        return _Move.apply(x, self, self.length, _own, _all_gather)

    def pick(self, x: Tensor) -> Tensor:
        """x (rows, T, width) -> (rows, t, width); the gradient is this rank's share of a sum."""
        return _Move.apply(x, self, self.length, _own, _put)

    def once(self, x: Tensor) -> Tensor:
        """x (rows, T, width) as it is, for a reader whose gradient is the same on every rank: each gives that of its
        own tokens, so that their sum is it."""
        return _Move.apply(x, self, self.length, _same, _put_own)

    def places(self, x: Tensor) -> Tensor:
        """Integers of all tokens (rows, T) -> of this rank's (rows, t); fillers get 0."""
        return _own(x[..., None], self, self.length)[..., 0] if x.shape[-1] == self.length else x


Step = Callable[[Tensor, TokenShares, int], Tensor]


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: TokenShares, length: int, there: Step, back: Step) -> Tensor:
        ctx.how = tokens, length, back
        return there(x, tokens, length)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, length, back = ctx.how
        return back(gradients[0], tokens, length), None, None, None, None


def _all_gather(x: Tensor, tokens: TokenShares, length: int) -> Tensor:
    parts = all_gather(x, tokens.group)  # (n, rows, t, width)
    return parts.movedim(0, -3).flatten(-3, -2)[..., :length, :].contiguous()


def _reduce_scatter(x: Tensor, tokens: TokenShares, length: int) -> Tensor:
    padded = F.pad(x, (0, 0, 0, tokens.ranks * tokens.count(length) - length))
    return reduce_scatter(padded.unflatten(-2, (tokens.ranks, -1)).movedim(-3, 0), tokens.group)


def _own(x: Tensor, tokens: TokenShares, length: int) -> Tensor:
    count = tokens.count(length)
    mine = x[..., tokens.rank * count : (tokens.rank + 1) * count, :]
    return F.pad(mine, (0, 0, 0, count - mine.shape[-2])).contiguous()


def _put(x: Tensor, tokens: TokenShares, length: int) -> Tensor:
    count = tokens.count(length)
    start = min(tokens.rank * count, length)
    mine = x[..., : min(count, length - start), :]
    return F.pad(mine, (0, 0, start, length - start - mine.shape[-2]))


def _put_own(x: Tensor, tokens: TokenShares, length: int) -> Tensor:
    return _put(_own(x, tokens, length), tokens, length)


def _same(x: Tensor, tokens: TokenShares, length: int) -> Tensor:
    return x.view_as(x)
