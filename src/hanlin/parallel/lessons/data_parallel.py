"""Data parallelism in one process: what `nn.DataParallel` does, written out. A thread a device.

    scatter     rows ──▶ a share of them on each device
    replicate   the weights ──▶ a copy on each device, before every forward
    apply       each copy its share, in a thread of its own
    gather      outputs ──▶ one tensor on the first device
    backward    autograd walks all of it back: the copies' gradients are summed into the one model

Every step sends the weights to n-1 devices and their gradients back, all through the first one: 2 (n-1) times the
model, where a ring of processes sends 2 (n-1)/n a rank; and the threads share one interpreter. So Hanlin trains with
processes (`parallel.data`). torch's own class does nothing on a CPU (it calls the module on all rows); this one splits
the rows there, too. Random numbers (dropout) are drawn in the order in which the threads come to them.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError


class ThreadedDataParallel(nn.Module):
    """`module` on several devices at once. Its parameters stay where and what they are: train them as usual.

    devices: may name one several times; outputs are on the first. Positional and keyword tensors are cut along their
    first dimension, which all have in common; everything else goes to each copy as it is. The module returns a tensor
    with those rows. State that a copy writes in its forward (a batch norm's statistics) stays of the first copy alone.
    """

    def __init__(self, module: nn.Module, devices: Sequence[torch.device | str]) -> None:
        super().__init__()
        if not devices:
            raise HanlinError("ThreadedDataParallel needs one device at least; found none.")
        self.module, self.devices = module, [torch.device(device) for device in devices]

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        shares = scatter(inputs, named, self.devices)
        devices = self.devices[: len(shares)]
        copies = [self.module] if len(shares) == 1 else replicate(self.module, devices)
        outputs = parallel_apply(copies, shares)
        return torch.cat([output.to(devices[0]) for output in outputs])


Share = tuple[tuple[Any, ...], dict[str, Any]]


def scatter(inputs: tuple[Any, ...], named: dict[str, Any], devices: Sequence[torch.device]) -> list[Share]:
    """The arguments of each device. Fewer rows than devices: the last devices get none, and are left out."""
    rows = {len(value) for value in (*inputs, *named.values()) if isinstance(value, Tensor)}
    if len(rows) != 1:
        raise HanlinError(f"All tensors must have the same number of rows, at least one tensor; found {sorted(rows)}.")
    count = max(1, min(rows.pop(), len(devices)))

    def cut(value: Any, share: int) -> Any:
        return value.tensor_split(count)[share].to(devices[share]) if isinstance(value, Tensor) else value

    return [
        (tuple(cut(value, share) for value in inputs), {name: cut(value, share) for name, value in named.items()})
        for share in range(count)
    ]


def replicate(module: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
    """A copy of the module for each device. Their weights are copied with autograd watching, so a gradient of a copy
    arrives, summed, at the module's own parameters; shared weights stay shared. Buffers: the first copy has the
    module's own where it is on that device."""
    return [_replica(module, device, first=index == 0) for index, device in enumerate(devices)]


def _replica(module: nn.Module, device: torch.device, first: bool) -> nn.Module:
    copied = {id(p): p.to(device, copy=True) for p in module.parameters()}  # one copy of a weight with two names
    twins: dict[int, nn.Module] = {}
    for old in module.modules():
        twin = old.__new__(type(old))
        twin.__dict__ = dict(old.__dict__)
        twin.__dict__["_parameters"] = {n: None if p is None else copied[id(p)] for n, p in old._parameters.items()}
        twin.__dict__["_buffers"] = {
            name: None if buffer is None else buffer.to(device, copy=not first) for name, buffer in old._buffers.items()
        }
        twins[id(old)] = twin
    for old in module.modules():
        twins[id(old)].__dict__["_modules"] = {
            name: None if child is None else twins[id(child)] for name, child in old._modules.items()
        }
    return twins[id(module)]


def parallel_apply(modules: Sequence[nn.Module], shares: Sequence[Share]) -> list[Tensor]:
    """Each module on its share, all at once. An error of one is raised here, when all have ended."""
    grad = torch.is_grad_enabled()  # a thread begins with torch's defaults
    casting, kind = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    casting_gpu, kind_gpu = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

    def apply(module: nn.Module, share: Share) -> Tensor:
        with (
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", kind, enabled=casting),
            torch.autocast("cuda", kind_gpu, enabled=casting_gpu),
        ):
            return module(*share[0], **share[1])

    with ThreadPoolExecutor(len(modules)) as pool:
        return list(pool.map(apply, modules, shares))
