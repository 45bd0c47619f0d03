"""What Muon sends to see whole matrices (`train.exchange`), of a rank in one optimizer step.

    flat share of ZeRO --all-gather over the replicas--> this rank's part --all-gather over the tensor group--> whole

    payload of a matrix     replicas x its longest share        where ZeRO shares it: it lies in its layer's buffer
                                                                wherever the parameters before it end
                            ranks x this rank's part            where tensor parallelism cuts it

Each expert of a stack is a matrix of its own, so the experts of other ranks are not needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.models.config import LayerConfig, ModelConfig
from hanlin.models.tensor_plan import PLAN, Cut, Once
from hanlin.models.transformer import Transformer
from hanlin.nn.experts import Experts
from hanlin.parallel.flat import by_kind, find_packs
from hanlin.parallel.settings import Layout
from hanlin.plan.held import Held
from hanlin.train.optim import parameter_kinds


@dataclass(frozen=True)
class Gathered:
    """An all-gather of one matrix. numbers: of its output; ranks: of the group."""

    axis: str
    numbers: int
    ranks: int


@dataclass(frozen=True)
class _Tensor:
    """A parameter of a layer on one tensor rank. cut: over the tensor group; once: on its first rank only; expert: of
    the routed experts; matrix: Muon's."""

    numel: int
    cut: bool
    once: bool
    expert: bool
    matrix: bool


def gathered_matrices(config: ModelConfig, held: Held, layout: Layout, *, tensor: int = 0) -> Iterator[Gathered]:
    """The all-gathers of one step of Muon on a rank that holds `held`."""
    if layout.tensor == 1 and layout.shard == "none":
        return
    if config.predict_ahead or (config.head is not None and config.head.transform):
        raise HanlinError(
            "The bytes of Muon are counted for the matrices of layers; this model has others, in its head or in "
            "modules that predict ahead. Plan it with adamw."
        )
    replicas = (layout.data or 1) * layout.context
    shared = layout.shard != "none"
    known: dict[LayerConfig, list[_Tensor]] = {}
    for number in held.layers:
        layer = held.config.layers[number]
        if layer not in known:
            known[layer] = _tensors(held.config, layer)
        here = [one for one in known[layer] if tensor == 0 or not one.once]
        if layout.expert > 1:
            experts = [replace(one, numel=one.numel // layout.expert) for one in here if one.expert]
            units = [
                ("replicas", [one for one in here if not one.expert], replicas),
                ("expert replicas", experts, replicas // layout.expert),
            ]
        else:
            units = [("replicas", here, replicas)]
        for axis, tensors, ranks in units:
            if shared and ranks > 1:
                yield from _shares(axis, tensors, ranks)
            if layout.tensor > 1:
                for one in tensors:
                    if one.matrix and one.cut:
                        yield Gathered("tensor", layout.tensor * one.numel, layout.tensor)


def _shares(axis: str, tensors: list[_Tensor], ranks: int) -> Iterator[Gathered]:
    """Of one buffer, which the ranks share equally."""
    size = -(-sum(one.numel for one in tensors) // ranks)
    start = 0
    for one in tensors:
        stop = start + one.numel
        if one.matrix:
            longest = max(min(stop, (rank + 1) * size) - max(start, rank * size) for rank in range(ranks))
            yield Gathered(axis, ranks * longest, ranks)
        start = stop


def _tensors(local: ModelConfig, layer: LayerConfig) -> list[_Tensor]:
    """The parameters of a layer of a local config, in the order of their buffer."""
    with torch.device("meta"):
        model = Transformer(replace(local, layers=(layer,), encoder=(), predict_ahead=0))
    kinds = parameter_kinds(model)
    names = {id(p): name for name, p in model.named_parameters()}
    block = model.model.layers[0]
    cut, once = _laid_out(block)
    experts = {id(p) for module in block.modules() if isinstance(module, Experts) for p in module.parameters()}
    [ordered] = by_kind(dict(block.named_parameters()), find_packs(block))
    return [
        _Tensor(p.numel(), id(p) in cut, id(p) in once, id(p) in experts, kinds[names[id(p)]] == "matrices")
        for p in ordered.values()
    ]


def _laid_out(block: nn.Module) -> tuple[set[int], set[int]]:
    """Ids of the parameters that tensor parallelism cuts, and of those that stay on its first rank."""
    cut: set[int] = set()
    once: set[int] = set()
    for module in block.modules():
        plan = PLAN.get(type(module))
        if plan is None:
            continue
        for name, parameter in module.named_parameters():
            layout = next((layout for pattern, layout in plan.tensors.items() if fnmatchcase(name, pattern)), None)
            if isinstance(layout, Cut):
                cut.add(id(parameter))
            elif isinstance(layout, Once):
                once.add(id(parameter))
    return cut, once
