"""What the processes of `test_ranks` do: a leader and its followers with a toy step in the place of a model."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hanlin.core.errors import HanlinError
from hanlin.engine.ranks import Leader, follow

TIMEOUT = 2.0


def step(plan: dict) -> list[float]:
    """The sum over ranks of the plan's numbers, times rank + 1; what else the plan says may befall a rank."""
    rank = dist.get_rank()
    if plan.get("error"):
        raise ValueError("步骤 failed")
    if plan.get("dies") == rank:
        os._exit(0)
    if plan.get("hangs") == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    x = torch.tensor(plan["numbers"]) * (rank + 1)
    dist.all_reduce(x)
    return x.tolist()


def play(rank: int, ranks: int, meeting: str, folder: str, plans: list[dict | float]) -> None:
    """Write what this rank saw to `folder`/rank, a line an event. A number in `plans` is a pause in seconds."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT)
    )
    seen: list[str] = []

    def noted(plan: dict) -> list[float]:
        found = step(plan)
        seen.append(f"{found} {plan.get('text', '')}")
        return found

    try:
        if rank:
            follow(None, noted)
            seen.append("returned")
        else:
            lead(plans, noted, seen)
    except HanlinError as error:
        seen.append(f"HanlinError {error}")
    Path(folder, str(rank)).write_text("\n".join(seen), encoding="utf-8")
    os._exit(0)  # a group whose other side is gone does not close in peace


def lead(plans: list[dict | float], run, seen: list[str]) -> None:
    leader = Leader(None, run, pulse=TIMEOUT / 5)
    for plan in plans:
        if isinstance(plan, float):
            time.sleep(plan)
            continue
        try:
            leader(plan)
        except (HanlinError, ValueError) as error:
            seen.append(f"{type(error).__name__} {error}")
    leader.stop()
    leader.stop()
    try:
        leader({"numbers": [1.0]})
    except HanlinError as error:
        seen.append(f"after stop: {error}")
