"""Replicas with something broken: the comparison with one process must see each."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from tests.parallel.replicas import Ways, train_together

from hanlin.parallel import shares


def mutants(ways: Ways) -> dict[str, float]:
    """The same comparison with something broken; each must be seen."""
    found = {}
    for way in ways:
        for name, broken in MUTATIONS.items():
            if name.startswith("all-reduce") != (way == "data"):
                continue
            with broken():
                found[f"{way}: {name}"] = train_together("untied", way)
    return found


@contextmanager
def swapped(owner: Any, name: str, new: Any) -> Generator[None]:
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


class Done:
    def wait(self) -> None:
        pass


def _mean(tensor: torch.Tensor, **rest: Any) -> Any:
    return ALL_REDUCE(tensor.div_(dist.get_world_size()), **rest)


def _mean_share(mine: torch.Tensor, whole: torch.Tensor, group: Any) -> Any:
    return REDUCE(mine, whole.div_(dist.get_world_size()), group)


def _neighbours_share(mine: torch.Tensor, whole: torch.Tensor, group: Any) -> Any:
    return REDUCE(mine, whole.roll(len(mine)), group)


def _local_share(mine: torch.Tensor, whole: torch.Tensor, _: Any) -> Done:
    mine.copy_(whole.chunk(dist.get_world_size())[dist.get_rank()])
    return Done()


ALL_REDUCE, REDUCE = dist.all_reduce, shares.reduce
MUTATIONS: dict[str, Callable[[], Any]] = {
    "all-reduce skipped": lambda: swapped(dist, "all_reduce", lambda *_, **__: Done()),
    "all-reduce of means": lambda: swapped(dist, "all_reduce", _mean),
    "reduce skipped": lambda: swapped(shares, "reduce", _local_share),
    "reduce of means": lambda: swapped(shares, "reduce", _mean_share),
    "reduce of a neighbour's share": lambda: swapped(shares, "reduce", _neighbours_share),
    "gather skipped": lambda: swapped(shares, "gather", lambda *_: Done()),
}
