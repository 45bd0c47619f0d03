"""The conjugate operators of tensor parallelism (Megatron-LM, arXiv:1909.08053, figure 3), as autograd functions.

                 forward                 backward
    copy_in      x                       sum of the ranks' gradients       f, where whole values enter a cut block
    sum_out      sum of the ranks' x     the gradient                      g, where partial sums leave it
    gather_out   the ranks' x, joined    this rank's columns of it         where cut columns leave it

A value that is equal on all ranks has an equal gradient on all ranks; of a partial sum or a column every rank has its
own. Sums are taken in the dtype of the tensor. All ranks get the same bits, whatever their number.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hanlin.core.errors import HanlinError

Group = dist.ProcessGroup | None  # None: all processes


def place(group: Group) -> tuple[int, int]:
    """(rank, ranks) of this process in a group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise HanlinError(
            "Tensor parallelism needs a process group; start the processes with `torchrun`, or call "
            "`torch.distributed.init_process_group` in each of them first."
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise HanlinError("This process is no member of the process group that it was given.")
    return rank, dist.get_world_size(group)


def copy_in(x: Tensor, group: Group) -> Tensor:
    """x, whose gradient is summed over the ranks."""
    return _CopyIn.apply(x, group) if torch.is_grad_enabled() else x


def sum_out(x: Tensor, group: Group) -> Tensor:
    """The ranks' sum of x. Without gradients in the memory of x."""
    return _SumOut.apply(x, group) if torch.is_grad_enabled() else all_sum(x, group)


def gather_out(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """x (..., sizes[rank]) -> (..., sum of sizes)."""
    return _GatherOut.apply(x, sizes, group) if torch.is_grad_enabled() else gather_columns(x, sizes, group)


def all_sum(x: Tensor, group: Group) -> Tensor:
    """The ranks' sum, in the memory of x if that is contiguous."""
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def gather_columns(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """As `gather_out`, outside of a graph."""
    widest = max(sizes)  # a collective wants equal shapes
    mine = x.contiguous() if x.shape[-1] == widest else torch.nn.functional.pad(x, (0, widest - x.shape[-1]))
    found = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(found, mine, group=group)
    return torch.cat([part[..., :size] for part, size in zip(found, sizes, strict=True)], -1)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """x of any shape, the same on all ranks -> (ranks, *shape)."""
    x = x.contiguous()
    found = x.new_empty(dist.get_world_size(group), *x.shape)
    _all_gather(found.view(-1), x.view(-1), group=group)
    return found


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """x (ranks, ...): part r of the ranks' sum -> (...) on rank r."""
    x = x.contiguous()
    found = x.new_empty(x.shape[1:])
    _reduce_scatter(found.view(-1), x.view(-1), group=group)
    return found


def _all_gather(found: Tensor, x: Tensor, group: Group) -> None:
    (dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor)(
        found, x, group=group
    )


def _reduce_scatter(found: Tensor, x: Tensor, group: Group) -> None:
    (dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor)(
        found, x, group=group
    )


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return all_sum(gradients[0].clone(memory_format=torch.contiguous_format), ctx.group), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_sum(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _GatherOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        rank = dist.get_rank(group)
        ctx.start, ctx.size = sum(sizes[:rank]), sizes[rank]
        return gather_columns(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].narrow(-1, ctx.start, ctx.size), None, None
