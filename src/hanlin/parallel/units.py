"""What of a model is gathered and reduced together: each layer, and the rest."""

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import nn

from hanlin.models.layer import Layer
from hanlin.parallel.flat import Flat, Named, by_kind, find_packs
from hanlin.parallel.shares import Share


@dataclass(eq=False)
class Unit:
    """What is gathered and reduced together. module: the layer; None: the rest. waiting: forwards whose backward is
    still to come; backward: whether it runs; wanted: whether this backward makes gradients of weights."""

    module: nn.Module | None
    shares: list[Share] = field(default_factory=list)
    waiting: int = 0
    backward: bool = False
    wanted: bool = False


def share_out(model: nn.Module, named: Named, group: dist.ProcessGroup, stage: int) -> list[Unit]:
    """The units that hold any of the parameters: layers in the order of the forward pass, then the rest."""
    packs = find_packs(model)
    left = {name: p for name, p in named.items() if stage == 3 or p.requires_grad}
    ahead = getattr(model, "ahead", None)
    apart = set(ahead.modules()) if isinstance(ahead, nn.Module) else set()  # may or may not run: with the rest
    modules = [module for module in model.modules() if isinstance(module, Layer) and module not in apart]
    units = []
    for module in [*modules, None]:
        owned = None if module is None else {id(p) for p in module.parameters()}
        mine = {name: p for name, p in left.items() if owned is None or id(p) in owned}
        left = {name: p for name, p in left.items() if name not in mine}
        unit = Unit(module)
        for kind in by_kind(mine, packs):
            share = Share(Flat(kind, dist.get_world_size(group)), packs, group, apart=stage == 3, keep=stage == 1)
            unit.shares.append(share)
            if stage == 3:
                share.give_back()
        if unit.shares:
            units.append(unit)
    return units
