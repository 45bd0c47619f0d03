"""What each of the processes of `test_exchange` does: Muon on this rank's flat shares of a tiny model."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_training import tiny_model

from hanlin.train.choices import Muon
from hanlin.train.exchange import MatrixExchange
from hanlin.train.optim import build_optimizer, group_parameters

STEPS, CHOICE = 3, Muon(weight_decay=0.1)


def gradient(parameter, step, index):
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def ranges_of(model, rank, world):
    """All parameters end to end, cut into equal shares: most lie on one rank, some across two."""
    found, start = {}, 0
    share = -(-sum(p.numel() for p in model.parameters()) // world)
    for name, p in model.named_parameters():
        first, last = max(start, rank * share), min(start + p.numel(), (rank + 1) * share)
        if first < last:
            found[name] = first - start, last - start
        start += p.numel()
    return found


def step_on_shares(rank: int, world: int, meeting: str, folder: str) -> None:
    """Three steps; this rank's shares end up in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    model = tiny_model().double()
    ranges = ranges_of(model, rank, world)
    named = dict(model.named_parameters())
    pieces = {n: torch.nn.Parameter(named[n].detach().reshape(-1)[a:b].clone()) for n, (a, b) in ranges.items()}
    matrices = group_parameters(model).matrices
    group = dist.group.WORLD
    exchange = MatrixExchange(
        {n: p.shape for n, p in matrices.items()}, ranges, dict.fromkeys(matrices, group), {}, None
    )
    optimizer = build_optimizer(model, CHOICE, 0.02, pieces=pieces, exchange=exchange)
    for step in range(STEPS):
        for index, (name, p) in enumerate(named.items()):
            if name in pieces:
                start, stop = ranges[name]
                pieces[name].grad = gradient(p, step, index).reshape(-1)[start:stop]
        optimizer.step(1.0)
    save_file({n: p.detach() for n, p in pieces.items()}, Path(folder, f"{rank}.safetensors"))
    dist.destroy_process_group()
