"""Replicas with something broken: the comparison with one process must see each."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from tests.parallel.replicas import Ways, train_together

from hanlin.parallel.flat import Flat


def mutants(ways: Ways) -> dict[str, float]:
    """The same comparison with something broken; each must be seen."""
    found = {}
    for way in ways:
        for name, broken in MUTATIONS.items():
            if name.startswith(("reduce", "gather", "share")) and way == "data":
                continue
            if name.startswith("all-reduce") and way != "data":
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


def _mean(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*tensors: torch.Tensor, **rest: Any) -> Any:
        tensors[-1].div_(dist.get_world_size())
        return call(*tensors, **rest)

    return run


def _local_share(mine: torch.Tensor, whole: torch.Tensor, **_: Any) -> Done:
    mine.copy_(whole.chunk(dist.get_world_size())[dist.get_rank()])
    return Done()


def _neighbours_share(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(mine: torch.Tensor, whole: torch.Tensor, **rest: Any) -> Any:
        return call(mine, whole.roll(len(mine)), **rest)

    return run


PIECES = Flat.pieces
MUTATIONS: dict[str, Callable[[], Any]] = {
    "all-reduce skipped": lambda: swapped(dist, "all_reduce", lambda *_, **__: Done()),
    "all-reduce of means": lambda: swapped(dist, "all_reduce", _mean(dist.all_reduce)),
    "reduce skipped": lambda: swapped(dist, "reduce_scatter_tensor", _local_share),
    "reduce of means": lambda: swapped(dist, "reduce_scatter_tensor", _mean(dist.reduce_scatter_tensor)),
    "reduce of a neighbour's share": lambda: swapped(
        dist, "reduce_scatter_tensor", _neighbours_share(dist.reduce_scatter_tensor)
    ),
    "gather skipped": lambda: swapped(dist, "all_gather_into_tensor", lambda *_, **__: Done()),
}
