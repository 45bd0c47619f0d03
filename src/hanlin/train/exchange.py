"""Matrices that are spread over ranks, brought together for an optimiser that needs them whole (Muon).

    flat share of ZeRO --all-gather over the replicas--> this rank's part --all-gather over the tensor group--> whole

A stack of experts needs no third step: each expert is a matrix of its own. Sent a step and matrix: the output of each
all-gather, shares padded to the longest.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hanlin.models.tensor_plan import Piece
from hanlin.parallel.tensor import cut_tensor, join_tensors

Span = tuple[int, int]


class MatrixExchange:
    """shapes: of this rank's part of each matrix, before ZeRO; spans: this rank's flat share of it, for those that ZeRO
    shares over `groups[name]`; cuts: how the part sits in the whole, for those that the tensor group shares. Every rank
    makes one of the same names."""

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        spans: Mapping[str, Span],
        groups: Mapping[str, Any],
        cuts: Mapping[str, Piece],
        tensor_group: Any,
    ) -> None:
        self._shapes, self._groups, self._cuts, self._tensor_group = shapes, groups, cuts, tensor_group
        self._spans: dict[str, list[Span]] = {}
        self._mine: dict[str, Span] = {}
        for name, group in groups.items():
            found: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(found, spans.get(name, (0, 0)), group=group)
            self._spans[name], self._mine[name] = found, spans.get(name, (0, 0))

    def whole(self, name: str, piece: Tensor) -> Tensor:
        """This rank's piece of an update -> all of it."""
        if name in self._groups:
            sizes = [stop - start for start, stop in self._spans[name]]
            longest = max(sizes)
            padded = torch.nn.functional.pad(piece.reshape(-1), (0, longest - piece.numel()))
            found = _gathered(padded, self._groups[name])
            order = sorted(range(len(sizes)), key=lambda rank: self._spans[name][rank])
            piece = torch.cat([found[rank][: sizes[rank]] for rank in order]).view(self._shapes[name])
        cut = self._cuts.get(name)
        if cut is None:
            return piece
        return join_tensors(_gathered(piece.contiguous(), self._tensor_group), cut, cut.units)

    def own(self, name: str, matrix: Tensor) -> Tensor:
        """All of an update -> this rank's piece."""
        cut = self._cuts.get(name)
        if cut is not None:
            matrix = cut_tensor(matrix, cut, cut.units, cut.rank, cut.ranks)
        if name not in self._groups:
            return matrix
        start, stop = self._mine[name]
        return matrix.reshape(-1)[start:stop]


def _gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, tensor, group=group)
    return found
