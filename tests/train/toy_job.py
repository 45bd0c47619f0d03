"""A training in thirty lines for several processes: linear regression in fp64 whose momentum is shared like ZeRO's.

    python toy_job.py FOLDER STEPS [--hurt RANK:STEP:HOW ...] [--pause SECONDS] [--save-every N] [--whole]

HOW: kill (SIGKILL), mistake (HanlinError), bug (an exception), in the first try only; "kill*" in every try.
Writes FOLDER/begun-RANK, with its process id, once it handles signals, and FOLDER/weights.json when done. It joins,
saves and continues exactly as the trainer does.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hanlin.core.errors import HanlinError
from hanlin.core.files import write_json, write_text
from hanlin.core.progress import say
from hanlin.core.runs import Run
from hanlin.parallel.joining import join_group
from hanlin.parallel.processes import Processes
from hanlin.train.checkpoint import Checkpoint
from hanlin.train.keeper import Keeper
from hanlin.train.sharded import Held
from hanlin.train.stop import StopRequest

WIDTH, ROWS = 24, 16


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return x, x @ torch.arange(WIDTH, dtype=torch.float64)


def summed(tensor: torch.Tensor, world: int) -> torch.Tensor:
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def hurt(hurts: list[str], rank: int, step: int) -> None:
    for who, when, how in (text.split(":") for text in hurts):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if (int(who), int(when)) == (rank, step) and (first or how.endswith("*")):
            if how.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise HanlinError("The recipe is wrong.") if how == "mistake" else KeyError("bug")


def work(arguments: argparse.Namespace) -> None:
    processes = Processes.here()
    rank, world = processes.rank, processes.world
    start, stop = rank * WIDTH // world, (rank + 1) * WIDTH // world
    weights, momentum, step = torch.zeros(WIDTH).double(), torch.zeros(stop - start).double(), 0
    with processes.first_alone():
        run = Run.open(arguments.folder)

    def held(tensor: torch.Tensor) -> list[Held]:
        span = None if arguments.whole else (start, stop)
        mine = [Held("weights/w", tensor, (WIDTH,))]
        return mine if arguments.whole else [*mine, Held("optimizer/w/momentum", momentum, (WIDTH,), (), span)]

    keeper = Keeper(run, processes, keep_last=2, notice=say, background=True)
    with keeper, StopRequest() as asked:
        if (found := keeper.newest()) is not None:
            for tensor in held(weights):
                found.put(tensor)
            step = found.step
            print(f"rank {rank} continues from {step}", flush=True)
        write_text(Path(arguments.folder) / f"begun-{rank}", str(os.getpid()))
        while step < arguments.steps:
            if summed(torch.tensor(float(bool(asked))), world) > 0:
                keeper.save(Checkpoint({"step": step}, held(weights)), None)
                print(f"rank {rank} stopped at {step}", flush=True)
                return
            time.sleep(arguments.pause)
            hurt(arguments.hurt, rank, step)
            x, y = (t[rank * ROWS // world : (rank + 1) * ROWS // world] for t in rows(step))
            gradient = summed(x.T @ (x @ weights - y) / ROWS, world)
            momentum.mul_(0.9).add_(gradient[start:stop])
            whole = torch.zeros(WIDTH).double()
            whole[start:stop] = weights[start:stop] - 0.02 * momentum
            weights.copy_(summed(whole, world))
            step += 1
            if step % arguments.save_every == 0:
                keeper.save(Checkpoint({"step": step}, held(weights)), None)
    if rank == 0:
        write_json(Path(arguments.folder) / "weights.json", weights.tolist())
        print("done", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    parser.add_argument("--hurt", nargs="*", default=[])
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--whole", action="store_true")
    torch.set_num_threads(1)
    try:
        with join_group("cpu"):
            work(parser.parse_args())
    except HanlinError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def result(folder: Path) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "weights.json").read_text()), dtype=torch.float64)


if __name__ == "__main__":
    sys.exit(main())
