"""Several processes training one model: each takes its rows of the step, sums are reduced, and N processes equal one.

Without an initialised process group everything here is the identity. The group is made by whoever starts the processes
(`torchrun` and the command line); this file only uses it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 1 << 24  # gradient numbers in one all-reduce


@dataclass(frozen=True)
class Ranks:
    """This process's place. device: where tensors for a collective must lie."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device) -> "Ranks":
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, rows: int) -> tuple[int, int]:
        """Which of a step's rows are this rank's: [start, stop)."""
        return self.rank * rows // self.world, (self.rank + 1) * rows // self.world

    def sum(self, values: Iterable[float]) -> list[float]:
        """Element-wise sum of the ranks' values, in fp64."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The ranks' sum of a tensor, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every rank's gradients become the sum over ranks. A parameter that this rank did not use counts as zero."""
        if self.world == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
            dist.all_reduce(flat)
            for parameter, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(piece.view_as(parameter))

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Every rank takes over rank 0's values."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > BUCKET
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
