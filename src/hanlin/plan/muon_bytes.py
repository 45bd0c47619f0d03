"""Bytes that a step of Muon takes for its duration: the updates of all matrices, and the work on one stack of them.

Stacks follow each other, and the last one's directions still live while the next is laid out; so every pair of
neighbours that differs from the others is run on fake tensors, and the fullest counts.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from hanlin.plan.fake import Fakes
from hanlin.train import choices
from hanlin.train.muon import STACK, Muon, equal_shapes

Shape = tuple[int, ...]


def muon_high(
    shapes: Sequence[Shape], choice: choices.Muon, dtype: torch.dtype | None, *, device: str = "cpu", ranks: int = 1
) -> int:
    """shapes: of the fp32 parameters, matrices or stacks of them; ranks: how many share each (ZeRO): then whole
    matrices are brought together for one stack at a time, and what moves them is made beside them."""
    updates = 4 * sum(map(_numbers, shapes)) if choice.nesterov or choice.state_bits == 8 else 0
    matrices = [shape[-2:] for shape in shapes for _ in range(shape[0] if len(shape) == 3 else 1)]
    stacks = [tuple(matrices[i] for i in members) for members in equal_shapes(_without_memory(matrices))]
    neighbours = set(pairwise([(), *stacks]))
    work = max((_work(*pair, choice, dtype, device) for pair in neighbours), default=0)
    if ranks == 1:
        return updates + work
    together = 4 * max(min(sum(map(_numbers, shapes)), STACK), max(map(_numbers, shapes), default=0))
    return updates // ranks + 2 * together + work


def _work(before: tuple[Shape, ...], now: tuple[Shape, ...], choice: choices.Muon, dtype: torch.dtype | None,
          device: str) -> int:  # fmt: skip
    with Fakes(device) as fakes:
        parameters = [nn.Parameter(torch.empty(*shape)) for shape in (*before, *now)]
        muon = Muon(parameters, lr=1e-3, nesterov=False, iterations=min(choice.iterations, 2), dtype=dtype)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        muon.step()  # makes its state
        fakes.ledger.restart()
        held = fakes.ledger.total
        muon.step()
        return fakes.ledger.peak - held


def _numbers(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _without_memory(shapes: Sequence[Shape]) -> list[torch.Tensor]:
    kinds = {shape: torch.empty(*shape, device="meta") for shape in set(shapes)}
    return [kinds[shape] for shape in shapes]
