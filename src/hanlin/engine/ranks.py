"""One engine over several processes: rank 0 schedules, the others compute what it says.

    rank 0     Worker ─▶ Leader: sends the plan to all, then runs it ─▶ logits
    rank r     follow:   receives a plan, runs it, waits for the next

A plan is plain numbers (`runner.Plan`), a few kilobytes a step. The model is cut by `parallel.tensor`, so every rank
holds its own heads' pages under the same page numbers. `open_ranks` starts the other processes on this machine.
"""

import atexit
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hanlin.core.errors import HanlinError
from hanlin.engine.limits import Limits, read_limits
from hanlin.engine.memory import SHARE, free_memory, open_memory
from hanlin.engine.opening import DTYPES, dtype_for
from hanlin.engine.runner import Runner
from hanlin.models.transformer import Transformer
from hanlin.nn.frozen import freeze
from hanlin.parallel.tensor import load_sharded, local_config

Group = dist.ProcessGroup | None
STOP = b""
OTHER = "import json, sys; from hanlin.engine.ranks import serve_rank; serve_rank(json.loads(sys.argv[1]))"
MEETING_SECONDS = 3600  # how long an idle rank waits for the next plan


class Leader:
    """What the worker calls instead of its runner. After `stop` the others have gone."""

    def __init__(self, group: Group, run: Callable[[Any], Any]) -> None:
        self._group, self._run = group, run
        self._stopped = False

    def __call__(self, plan: Any) -> Any:
        self._send(pickle.dumps(plan))
        try:
            return self._run(plan)
        except RuntimeError as error:
            if dist.get_world_size(self._group) > 1 and _is_lost(error):
                self._stopped = True
                raise HanlinError(f"A rank of this engine is gone; start it again. ({error})") from error
            raise

    def stop(self) -> None:
        """Let the others return from `follow`. Harmless the second time, and when they are dead."""
        if not self._stopped:
            self._stopped = True
            try:
                self._send(STOP)
            except RuntimeError:
                return

    def _send(self, message: bytes) -> None:
        try:
            dist.broadcast(torch.tensor([len(message)]), group_src=0, group=self._group)
            if message:
                body = torch.frombuffer(bytearray(message), dtype=torch.uint8)
                dist.broadcast(body, group_src=0, group=self._group)
        except RuntimeError as error:
            raise HanlinError(f"A rank of this engine is gone; start it again. ({error})") from error


def follow(group: Group, run: Callable[[Any], Any]) -> None:
    """Run what rank 0 sends until it says stop. An error of a step is rank 0's too (both computed the same): go on."""
    size = torch.zeros(1, dtype=torch.int64)
    while True:
        dist.broadcast(size, group_src=0, group=group)
        if not int(size):
            return
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(body, group_src=0, group=group)
        run(pickle.loads(body.numpy().tobytes()))  # from our own rank 0, in memory


def _is_lost(error: RuntimeError) -> bool:
    return any(word in str(error) for word in ("gloo", "Connection", "NCCL", "timed out"))


def refuse_alone(limits: Limits, draft: Any = None, adapters: Any = None) -> None:
    """What an engine over several ranks does not do, by name."""
    for name, used in [
        ("host_bytes", limits.host_bytes), ("disk_folder", limits.disk_folder), ("draft", draft),
        ("adapters", adapters),
        ("speculate", limits.speculate in ("draft", "mtp")),
    ]:  # fmt: skip
        if used:
            raise HanlinError(f"{name} does not work over several ranks; leave it out, or open the model with one.")


def open_ranks(
    folder: str | os.PathLike[str], ranks: int, *, dtype: torch.dtype | str, device: str, limits: Mapping[str, Any]
) -> tuple[Transformer, dict[str, Any]]:
    """Start ranks 1 … on this machine and join them as rank 0: this rank's share of the model, and limits that all
    agree on. The processes end with this one, or with `Leader.stop`."""
    if device not in ("auto", "cpu"):
        raise HanlinError(f"Several ranks on one machine compute on its CPU; device is {device!r}.")
    if dist.is_initialized():
        raise HanlinError("This process belongs to a process group already; an engine over ranks needs one of its own.")
    chosen = dtype_for(folder, dtype)
    name = next(known for known, value in DTYPES.items() if value == chosen)
    agreed = {"cache_bytes": int(SHARE * free_memory(torch.device("cpu"))) // ranks, **limits}
    meeting = tempfile.mkdtemp(prefix="hanlin-ranks-")
    threads = max(1, torch.get_num_threads() // ranks)
    common = {"folder": str(folder), "ranks": ranks, "dtype": name, "limits": agreed, "threads": threads}
    common["meeting"] = str(Path(meeting) / "store")
    others = [
        subprocess.Popen([sys.executable, "-c", OTHER, json.dumps(common | {"rank": rank})]) for rank in range(1, ranks)
    ]
    atexit.register(_end, others, meeting)
    torch.set_num_threads(threads)
    return _join(common | {"rank": 0}), agreed


def _join(about: Mapping[str, Any]) -> Transformer:
    dist.init_process_group(
        "gloo", init_method=f"file://{about['meeting']}", rank=about["rank"], world_size=about["ranks"],
        timeout=timedelta(seconds=MEETING_SECONDS),
    )  # fmt: skip
    model = load_sharded(about["folder"], dtype=DTYPES[about["dtype"]])
    freeze(model)
    return model.eval()


def serve_rank(about: Mapping[str, Any]) -> None:
    """The whole life of a rank but the first."""
    torch.set_num_threads(about["threads"])
    model = _join(about)
    limits = read_limits(about["limits"])
    memory = open_memory(model, limits, config=local_config(model.config, about["ranks"]))
    follow(None, Runner(model, memory.cache, height=limits.step_tokens if limits.pad_products else 0))
    dist.destroy_process_group()


def _end(processes: "list[subprocess.Popen[bytes]]", meeting: str) -> None:
    for process in processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
    shutil.rmtree(meeting, ignore_errors=True)
