"""Where this process stands: one `DeviceMesh` of all ranks, and the process group of every axis.

    rank = ((pipeline * D + data) * C + context) * T + tensor            axes outermost to innermost

    replicas          data x context: those that hold the same dense weights, so their gradients are summed
    expert            `layout.expert` neighbours on the data axis, which share one set of experts
    expert_replicas   those of `replicas` that hold the same experts

One process needs no process group: then every axis has size 1 and its group is None.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hanlin.parallel.settings import Layout

AXES = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True)
class Mesh:
    """layout: with `data` filled in. places: {axis: (index, size, group)}; the group of an axis of size 1 is None."""

    layout: Layout
    device: torch.device
    rank: int
    world: int
    places: dict[str, tuple[int, int, Any]]

    @classmethod
    def open(cls, layout: Layout, device: torch.device) -> "Mesh":
        """The mesh over the initialised process group, or of this process alone. Every rank calls it."""
        if not (dist.is_available() and dist.is_initialized()):
            names = (*AXES, "replicas", "expert", "expert_replicas")
            return cls(layout.fitted(1), device, 0, 1, dict.fromkeys(names, (0, 1, None)))
        world = dist.get_world_size()
        layout = layout.fitted(world)
        sizes = (layout.pipeline, layout.data or 1, layout.context, layout.tensor)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        places = {axis: _place(mesh[axis], size) for axis, size in zip(AXES, sizes, strict=True)}
        ranks = mesh.mesh.transpose(2, 3).transpose(1, 2)  # (pipeline, tensor, data, context)
        parts = ranks.reshape(*ranks.shape[:2], sizes[1] // layout.expert, layout.expert, layout.context)
        places["replicas"] = _group(ranks.flatten(2).flatten(0, 1))
        places["expert"] = _group(parts.transpose(3, 4).reshape(-1, layout.expert))
        places["expert_replicas"] = _group(parts.permute(0, 1, 3, 2, 4).reshape(-1, parts.shape[2] * layout.context))
        return cls(layout, device, dist.get_rank(), world, places)

    def index(self, axis: str) -> int:
        """This process's place on the axis."""
        return self.places[axis][0]

    def size(self, axis: str) -> int:
        return self.places[axis][1]

    def group(self, axis: str) -> Any:
        """The process group of the axis; None where it has one rank."""
        return self.places[axis][2]

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def _place(mesh: DeviceMesh, size: int) -> tuple[int, int, Any]:
    return (0, 1, None) if size == 1 else (mesh.get_local_rank(), size, mesh.get_group())


def _group(rows: torch.Tensor) -> tuple[int, int, Any]:
    """The group of the row that this rank stands in; every rank makes every group, in the same order."""
    if rows.shape[1] == 1:
        return 0, 1, None
    mine = None
    for row in rows.tolist():
        group = dist.new_group(row)
        if dist.get_rank() in row:
            mine = row.index(dist.get_rank()), len(row), group
    assert mine is not None
    return mine
