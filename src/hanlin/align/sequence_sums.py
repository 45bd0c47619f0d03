"""Sums over ragged sequences: numbers of trained tokens, flat, each with the number of the sequence it belongs to.

    x         .3 .1 .2   .5 .4        (n,)       no padding, no shift
    sequence   0  0  0    2  2        (n,)       0 ... count - 1, ascending; here sequence 1 has no token

A sequence without a token adds nothing to any sum. Nothing here divides by what other micro-batches would change: the
trainer divides the sums by denominators counted over the whole optimizer step.
"""

from typing import Literal

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError

Aggregate = Literal["token", "sequence", "constant"]


def sum_by_sequence(x: Tensor, sequence: Tensor, count: int) -> Tensor:
    """x (n,), sequence (n,) int64 -> (count,): the sum over each sequence's tokens, 0 where there is none."""
    return x.new_zeros(count).index_add(0, sequence, x)


def mean_by_sequence(x: Tensor, sequence: Tensor, count: int) -> Tensor:
    """x (n,), sequence (n,) int64 -> (count,): the mean over each sequence's tokens, 0 where there is none."""
    lengths = torch.bincount(sequence, minlength=count).clamp_min(1)
    return sum_by_sequence(x, sequence, count) / lengths


def aggregate(x: Tensor, sequence: Tensor, count: int, how: Aggregate, length: float | None = None) -> Tensor:
    """A scalar sum of x (n,), in one of the three ways in which answers of unequal length are weighed.

    how           sum                             the trainer divides by   used by
    "token"       of all tokens                   trained tokens           DAPO, PPO
    "sequence"    over sequences of token means   sequences                GRPO, GSPO, RLOO
    "constant"    of all tokens / `length`        sequences                Dr. GRPO (length: tokens an answer may have)
    """
    if how == "token":
        return x.sum()
    if how == "sequence":
        return mean_by_sequence(x, sequence, count).sum()
    if how != "constant":
        raise HanlinError(f"aggregate is {how!r}; it must be token, sequence or constant.")
    if length is None or not length > 0:
        raise HanlinError(f'aggregate "constant" needs a `length` above 0 to divide by; it is {length}.')
    return x.sum() / length
