"""One call of every kind, under the tracer."""

from typing import Any

import torch
import torch.distributed as dist
from tests.parallel.replicas import Ways
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hanlin.parallel.collectives import copy_in
from hanlin.parallel.shares import gather, reduce
from hanlin.parallel.tracer import Tracer


def every_call(_: Ways) -> dict[str, Any]:
    """[operation, payload, ranks] of every call, in order; and of a group of one's own; and in a backward."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, whole = torch.ones(6), torch.ones(6 * ranks, dtype=torch.float64)
    parts = [torch.empty(6) for _ in range(ranks)]
    other, pair = (rank + 1) % ranks, dist.new_group([0, 1])
    with Tracer() as tracer:
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        gather(whole, torch.ones(6, dtype=torch.float64), dist.group.WORLD).wait()
        dist.all_gather(parts, x)
        reduce(torch.empty(6, dtype=torch.float64), whole, dist.group.WORLD).wait()
        dist.all_to_all_single(torch.empty_like(whole), whole)
        dist.all_to_all(parts, [x.clone() for _ in range(ranks)])
        dist.broadcast(x, src=0)
        dist.reduce(x, dst=0)
        for work in dist.batch_isend_irecv([
            dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, torch.empty(6), (rank - 1) % ranks)
        ]):  # fmt: skip
            work.wait()
        dist.barrier()
        if rank < 2:
            dist.all_reduce(x.bfloat16(), group=pair)
    dist.all_reduce(x)  # after it, nothing is seen
    calls = [[call.op, call.payload, len(call.ranks)] for call in tracer.calls]
    with Tracer() as backward:
        leaf = torch.ones(5, requires_grad=True)
        copy_in(leaf, dist.group.WORLD).sum().backward()
    with Tracer() as functional:
        mesh = init_device_mesh("cpu", (ranks,))
        spread = distribute_tensor(torch.ones(ranks, 4), mesh, [Shard(0)])
        before = len(functional.calls)
        spread.full_tensor()
        spread.sum().full_tensor()
    return {
        "calls": calls, "backward": [[c.op, c.payload] for c in backward.calls],
        "dtensor": [[c.op, c.payload, c.size] for c in functional.calls[before:]],
        "bytes": tracer.bytes(), "pair": tracer.bytes((0, 1)), "wire": tracer.wire(),
    }  # fmt: skip
