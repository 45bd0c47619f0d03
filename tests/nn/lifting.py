"""transformers computes parts of its models (norms, routers, angles) in fp32 whatever the weights are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def lifted() -> Iterator[None]:
    """Inside, its casts to fp32 lead to fp64: a module in fp64 is one throughout, and 1e-10 can be asked of it."""
    names = {"float32": torch.float64, "float": torch.float64}
    before = {name: getattr(torch, name) for name in names}
    cast = torch.Tensor.float
    for name, dtype in names.items():
        setattr(torch, name, dtype)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        for name, dtype in before.items():
            setattr(torch, name, dtype)
        torch.Tensor.float = cast
