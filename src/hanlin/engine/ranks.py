"""One engine over several processes: rank 0 schedules, the others compute what it says.

    rank 0     Worker ─▶ Leader: sends the plan to all, then runs it ─▶ logits
    rank r     follow:   receives a plan, runs it, waits for the next

A plan is plain numbers (`runner.Plan`), a few kilobytes a step. The model is cut by `parallel.tensor`, so every rank
holds its own heads' pages under the same page numbers. `open_ranks` starts the other processes on this machine.

A rank that dies closes its connections, and the others fail at once; one that hangs is given up after
`SILENCE_SECONDS`, the group's timeout. So that an idle engine is none that hangs, the leader sends a pulse.
"""

import contextlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Generator, Mapping
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
from hanlin.models.folder import load_config
from hanlin.models.transformer import Transformer
from hanlin.nn.frozen import freeze
from hanlin.parallel.tensor import load_sharded, local_config

Group = dist.ProcessGroup | None
MARK = 0x48414E4C494E  # begins every message: a rank that is out of step reads something else there
STOP, PULSE = -1, 0  # in the place of a plan's length
OTHER = "import json, sys; from hanlin.engine.ranks import serve_rank; serve_rank(json.loads(sys.argv[1]))"
SILENCE_SECONDS = 120.0  # a rank that says nothing for so long is lost
LOADING_SECONDS = 3600.0  # how long the first waits for the last to have its weights
LOST = "A rank of this engine is gone; start it again."

log = logging.getLogger(__name__)


class Leader:
    """What the worker calls instead of its runner. After `stop` the others have gone.

    group: of gloo, whose timeout says when a rank counts as lost; pulse: seconds between signs of life, well below it.
    Errors of `run` are raised as they are; a rank that is lost is a `HanlinError`, from then on at every call.
    """

    def __init__(self, group: Group, run: Callable[[Any], Any], *, pulse: float = SILENCE_SECONDS / 4) -> None:
        self._group, self._run = group, run
        self._turn = threading.Lock()  # a pulse must not fall between the collectives of a step
        self._over = threading.Event()
        self._lost: str | None = None
        if dist.get_world_size(group) > 1:
            threading.Thread(target=self._keep_alive, args=(pulse,), daemon=True, name="ranks-pulse").start()

    def __call__(self, plan: Any) -> Any:
        with self._turn:
            if self._over.is_set():
                raise HanlinError(self._lost or "The other ranks of this engine were stopped; open it again.")
            message = pickle.dumps(plan)
            with self._noticing_loss():
                self._send(len(message), message)
                return self._run(plan)

    def stop(self) -> None:
        """Let the others return from `follow`. Harmless the second time, and when they are dead."""
        with self._turn, contextlib.suppress(HanlinError):
            if not self._over.is_set():
                self._over.set()
                with self._noticing_loss():
                    self._send(STOP)

    def _keep_alive(self, pulse: float) -> None:
        while not self._over.wait(pulse):
            with self._turn, contextlib.suppress(HanlinError):  # the next call tells
                if not self._over.is_set():
                    with self._noticing_loss():
                        self._send(PULSE)

    def _send(self, length: int, message: bytes = b"") -> None:
        dist.broadcast(torch.tensor([MARK, length]), group_src=0, group=self._group)
        if message:
            body = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            dist.broadcast(body, group_src=0, group=self._group)

    @contextlib.contextmanager
    def _noticing_loss(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            if dist.get_world_size(self._group) == 1 or not _is_lost(error):
                raise
            self._over.set()
            self._lost = f"{LOST} ({_first_line(error)})"
            raise HanlinError(self._lost) from error


def follow(group: Group, run: Callable[[Any], Any]) -> None:
    """Run what rank 0 sends until it says stop. `HanlinError` where another rank is lost.

    Any other error of a step is logged and followed by the next step: rank 0 computed the same and tells its callers.
    """
    try:
        while (length := _receive(group)) != STOP:
            if length != PULSE:
                body = torch.empty(length, dtype=torch.uint8)
                dist.broadcast(body, group_src=0, group=group)
                plan = pickle.loads(body.numpy().tobytes())  # from our own rank 0, over the loopback
                try:
                    run(plan)
                except Exception as error:
                    if isinstance(error, RuntimeError) and _is_lost(error):
                        raise
                    log.exception("A step failed on rank %d.", dist.get_rank(group))
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise HanlinError(f"{LOST} ({_first_line(error)})") from error


def _receive(group: Group) -> int:
    """The length of the next plan, STOP or PULSE."""
    head = torch.zeros(2, dtype=torch.int64)
    dist.broadcast(head, group_src=0, group=group)
    mark, length = head.tolist()
    if mark != MARK or length < STOP:
        raise HanlinError("The ranks of this engine are out of step; start it again.")
    return length


def _is_lost(error: RuntimeError) -> bool:
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


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
    agree on. The processes end with `Leader.stop`, with the model, or with this process."""
    if device not in ("auto", "cpu"):
        raise HanlinError(f"Several ranks on one machine compute on its CPU; device is {device!r}.")
    if dist.is_initialized():
        raise HanlinError("This process belongs to a process group already; an engine over ranks needs one of its own.")
    local_config(load_config(folder), ranks)  # refuses what cannot be cut, before anything is started
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
    torch.set_num_threads(threads)
    try:
        model = _join(common | {"rank": 0})
    except BaseException:
        _end(others, meeting, patience=0)
        raise
    weakref.finalize(model, _end, others, meeting)  # at exit, too: after the engine, which is younger, said stop
    return model, agreed


def _join(about: Mapping[str, Any]) -> Transformer:
    """Meet the other ranks and load; until all have loaded."""
    with _loopback():
        dist.init_process_group(
            "gloo", init_method=f"file://{about['meeting']}", rank=about["rank"], world_size=about["ranks"],
            timeout=timedelta(seconds=SILENCE_SECONDS),
        )  # fmt: skip
    model = load_sharded(about["folder"], dtype=DTYPES[about["dtype"]])
    freeze(model)
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=LOADING_SECONDS))
    except RuntimeError as error:
        raise HanlinError(f"Another rank could not load the model. ({_first_line(error)})") from error
    return model.eval()


def serve_rank(about: Mapping[str, Any]) -> None:
    """The whole life of a rank but the first."""
    for sign in (signal.SIGINT, signal.SIGTERM):  # meant for rank 0, which still needs us for the answers under way
        signal.signal(sign, signal.SIG_IGN)
    torch.set_num_threads(about["threads"])
    try:
        model = _join(about)
        limits = read_limits(about["limits"])
        memory = open_memory(model, limits, config=local_config(model.config, about["ranks"]))
        follow(None, Runner(model, memory.cache, height=limits.step_tokens if limits.pad_products else 0))
    except HanlinError as error:
        sys.exit(f"Rank {about['rank']}: {error}")
    dist.destroy_process_group()


@contextlib.contextmanager
def _loopback() -> Generator[None]:
    """Connections that are made meanwhile do not leave this machine (gloo takes the host's public address)."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before


def _end(processes: "list[subprocess.Popen[bytes]]", meeting: str, *, patience: float = 5) -> None:
    for process in processes:
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if dist.is_initialized():
        dist.destroy_process_group()
    shutil.rmtree(meeting, ignore_errors=True)
