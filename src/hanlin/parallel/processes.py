"""The processes of a run before any model is laid over them: who writes, and waiting for one another."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's place among all of them; one process without a group."""

    rank: int
    world: int

    @classmethod
    def here(cls) -> "Processes":
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @contextmanager
    def first_alone(self) -> Generator[None]:
        """The first process goes through alone, then the others."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


def over_all(values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Small values summed (or otherwise taken together) over all processes, on the device on which they were given; as
    they are without a group. Every process calls this."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    there = values.cuda() if dist.get_backend() == "nccl" else values.clone()
    dist.all_reduce(there, op=op)
    return there.to(values.device)
