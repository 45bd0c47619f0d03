"""What each process of the tests of the lessons computes: ours beside torch's collective, and what the tracer saw."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from hanlin.parallel.lessons import eight, ring_all_reduce
from hanlin.parallel.tracer import Tracer

SHAPES = ((5, 3), (1,), (2, 1, 4))


def compare(rank: int, n: int, meeting: str, folder: str) -> None:
    """Writes {name: [largest gap over shapes and dtypes, bytes traced, bytes expected]} to `folder`/rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=n)
    torch.manual_seed(rank)
    told: dict[str, list[float]] = {}

    def note(name: str, run, wanted, sent: int) -> None:
        with Tracer() as tracer:
            found = run()
        assert {call.op for call in tracer.calls} <= {"send"}, tracer.calls
        if wanted is None:
            assert found is None, name
            gap = 0.0
        else:
            assert found.shape == wanted.shape and found.dtype == wanted.dtype, name
            gap = float((found - wanted).abs().max()) if found.numel() else 0.0
        before = told.get(name, [0.0, 0, 0])
        told[name] = [max(before[0], gap), before[1] + tracer.bytes().get("send", 0), before[2] + sent]

    for dtype in (torch.float64, torch.int64):
        for shape in SHAPES:
            for root in range(n):
                rooted(note, random(shape, dtype), random((n, *shape), dtype), root, n, rank)
            symmetric(note, random(shape, dtype), random((n, *shape), dtype), n, rank)
        for numbers in (0, 2, 12, 37):
            x = random((numbers,), dtype)
            wanted = x.clone()
            dist.all_reduce(wanted)
            sent = ring_all_reduce.bytes_sent(numbers, x.element_size(), n, rank)
            note("ring", lambda x=x: ring_all_reduce.ring_all_reduce(x), wanted, sent)
            told[f"bits {dtype} {numbers}"] = x.view(torch.int64).tolist()
    with Tracer() as tracer:
        dist.all_reduce(random((12,), torch.float64))
    told["wire"] = [tracer.wire()["all_reduce"], ring_all_reduce.bytes_sent(12, 8, n, rank)]
    if n > 1:
        halves(told, n, rank)
    Path(folder, str(rank)).write_text(json.dumps(told))
    dist.destroy_process_group()


def rooted(note, x: torch.Tensor, parts: torch.Tensor, root: int, n: int, rank: int) -> None:
    """Broadcast, reduce, scatter, gather, from or to `root`."""
    one, all_ = x.numel() * x.element_size(), parts.numel() * parts.element_size()

    def on_root(value: torch.Tensor) -> torch.Tensor | None:
        return value if rank == root else None  # elsewhere it is a part of the sum, torch's too

    wanted = x.clone()
    dist.broadcast(wanted, root)
    given = x.clone()
    note("broadcast", lambda: eight.broadcast(given, root), wanted, eight.cost("broadcast", one, n, rank, root).sent)

    wanted = x.clone()
    dist.reduce(wanted, root)
    sent = eight.cost("reduce", one, n, rank, root).sent
    note("reduce", lambda: on_root(eight.reduce(x, root)), on_root(wanted), sent)

    wanted, part = torch.empty_like(x), torch.empty_like(x)
    dist.scatter(wanted, list(parts) if rank == root else None, src=root)
    given = parts if rank == root else None
    sent = eight.cost("scatter", all_, n, rank, root).sent
    note("scatter", lambda: eight.scatter(part, given, root), wanted, sent)

    lists = [torch.empty_like(x) for _ in range(n)] if rank == root else None
    dist.gather(x, lists, dst=root)
    wanted = None if lists is None else torch.stack(lists)
    note("gather", lambda: eight.gather(x, root), wanted, eight.cost("gather", all_, n, rank, root).sent)


def symmetric(note, x: torch.Tensor, parts: torch.Tensor, n: int, rank: int) -> None:
    """The four in which all ranks are alike."""
    one, all_ = x.numel() * x.element_size(), parts.numel() * parts.element_size()
    lists = [torch.empty_like(x) for _ in range(n)]
    dist.all_gather(lists, x)
    note("all_gather", lambda: eight.all_gather(x), torch.stack(lists), eight.cost("all_gather", all_, n, rank).sent)

    whole = parts.clone()
    dist.all_reduce(whole)
    sent = eight.cost("reduce_scatter", all_, n, rank).sent
    note("reduce_scatter", lambda: eight.reduce_scatter(parts), whole[rank], sent)

    wanted = x.clone()
    dist.all_reduce(wanted)
    note("all_reduce", lambda: eight.all_reduce(x), wanted, eight.cost("all_reduce", one, n, rank).sent)

    wanted = torch.empty_like(parts)
    dist.all_to_all_single(wanted, parts)
    note("all_to_all", lambda: eight.all_to_all(parts), wanted, eight.cost("all_to_all", all_, n, rank).sent)


def halves(told: dict[str, list[float]], n: int, rank: int) -> None:
    """Within a group of the odd ranks, where ranks of the group and of the run differ."""
    group = dist.new_group([r for r in range(n) if r % 2])
    if rank % 2 == 0:
        return
    x = random((3, 2), torch.float64)
    wanted = x.clone()
    dist.all_reduce(wanted, group=group)
    gaps = [eight.all_reduce(x, group) - wanted, ring_all_reduce.ring_all_reduce(x.clone(), group) - wanted]
    told["within a group"] = [float(torch.stack(gaps).abs().max())]


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.randint(-99, 99, shape, dtype=dtype)
