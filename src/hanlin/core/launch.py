"""Starting several processes of one command on this machine, and starting them again when one is lost.

    launcher ──┬─ rank 0   terminal            Ctrl-C, SIGTERM: passed on to all; they save and end
               ├─ rank 1   logs/rank-1.log     one killed: the others are ended, all start again from the checkpoint
               └─ rank 2   logs/rank-2.log     exit code 2, a mistake that was explained: shown once, not tried again

A worker learns its place from the variables that `torchrun` sets, so the same command runs under `torchrun` and Slurm
across machines. No torch here: the launcher itself costs nothing.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.core.progress import say

EXPLAINED = 2  # exit code of a mistake that was explained (`HanlinError`): to try again changes nothing
LOST_ANOTHER = 75  # exit code of a process that ended because another was lost
LAUNCHER = "HANLIN_LAUNCHER"  # in a worker's environment: the process to end with
SETTLE = 5.0  # seconds after one has failed in which the others end by themselves, most for the same reason
GRACE = 15.0  # seconds that they get in all: a write in flight is finished in them
TAIL = 25  # lines shown of the log of a worker that failed
STRICKEN = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Worker:
    """log: where its output goes, None for the terminal; begins: where this try's part of it begins; ended_by_us: it
    was killed because another had failed."""

    rank: int
    process: subprocess.Popen[Any]
    log: Path | None
    begins: int = 0
    ended_by_us: bool = False

    @property
    def code(self) -> int | None:
        """None while it runs; -N: killed by signal N."""
        return self.process.poll()

    def send(self, number: int) -> None:
        if self.code is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """At once, with the processes that it started."""
        if self.code is None:
            self.ended_by_us = True
            os.killpg(self.process.pid, signal.SIGKILL)

    def tail(self) -> str:
        """The last lines that this try wrote to its log."""
        if self.log is None:
            return ""
        text = self.log.read_bytes()[self.begins :].decode(errors="replace")
        return "\n".join(text.strip().splitlines()[-TAIL:])


def launch(
    command: Sequence[str],
    nproc: int,
    *,
    logs: str | os.PathLike[str],
    restarts: int = 3,
    grace: float = GRACE,
    environment: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> int:
    """Run `command` in `nproc` processes until all have ended well; returns the exit code.

    logs: folder for what the ranks but the first print. restarts: how often all are started again after a failure
    that was not explained. 0: all ended well, also after a signal; N: of the process that failed, 128 + N if a signal
    killed it.
    """
    if nproc < 1:
        raise HanlinError(f"--nproc is the number of processes, 1 or more; found {nproc}.")
    if restarts < 0:
        raise HanlinError(f"--restarts is how often a run starts again, 0 or more; found {restarts}.")
    if inside := next((name for name in ("RANK", "WORLD_SIZE", LAUNCHER) if name in os.environ), None):
        raise HanlinError(
            f"--nproc starts processes, but this is one of several already ({inside} is set). Leave --nproc out: "
            "torchrun, srun or another launcher has started them."
        )
    folder = Path(logs)
    folder.mkdir(parents=True, exist_ok=True)
    with _PassingOn() as signals:
        for attempt in range(restarts + 1):
            workers = _start(command, nproc, folder, attempt, dict(os.environ if environment is None else environment))
            signals.workers = workers
            try:
                _await(workers, grace)
            finally:
                for worker in workers:  # whatever happened to this process, none is left behind
                    worker.kill()
            failed = _culprit(workers)
            if failed is None or signals.received:
                break
            _explain(failed)
            if failed.code == EXPLAINED:
                break
            if attempt == restarts:
                again = "The same command continues from the last checkpoint."
                say(f"{_fate(failed)}; given up after {restarts} restarts. {again}")
                break
            say(
                f"{_fate(failed)}; all {nproc} processes start again from the last checkpoint "
                f"({attempt + 1} of {restarts} restarts).",
                quiet=quiet,
            )
    if failed is None:
        return 0
    code = failed.code or 0
    return 128 - code if code < 0 else code


def share_of_cores(nproc: int) -> int:
    """Threads for each of `nproc` processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // nproc)


def free_port() -> int:
    """A port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(command: Sequence[str], nproc: int, logs: Path, attempt: int, environment: dict[str, str]) -> list[Worker]:
    places = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        LAUNCHER: str(os.getpid()),
    }
    habits = {"OMP_NUM_THREADS": str(share_of_cores(nproc))}
    if sys.platform.startswith("linux"):
        habits["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks for the address of this machine's name, if it has one
    workers = []
    for rank in range(nproc):
        own = habits | environment | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "process_group": 0, "env": own}
        if rank == 0:
            workers.append(Worker(rank, subprocess.Popen(list(command), **settings), None))
            continue
        log = logs / f"rank-{rank}.log"
        own["PYTHONUNBUFFERED"] = "1"
        with log.open("ab") as stream:
            begins = stream.tell()
            process = subprocess.Popen(list(command), stdout=stream, stderr=subprocess.STDOUT, **settings)
        workers.append(Worker(rank, process, log, begins))
    return workers


def _await(workers: list[Worker], grace: float) -> None:
    """Until all have ended; once one has failed the others are asked to end, then killed."""
    failed_at: float | None = None
    asked = False
    while any(worker.code is None for worker in workers):
        now = time.monotonic()
        if failed_at is None and any(worker.code for worker in workers):
            failed_at = now
        waited = 0.0 if failed_at is None else now - failed_at
        if waited > min(SETTLE, grace) and not asked:
            asked = True
            for worker in workers:
                worker.send(signal.SIGTERM)
        if waited > grace:
            for worker in workers:
                worker.kill()
        time.sleep(0.05)


def _culprit(workers: list[Worker]) -> Worker | None:
    """The one that failed first, as far as the exit codes say: the others lost it, or were ended by us."""

    def weight(worker: Worker) -> int:
        code = worker.code or 0
        if worker.ended_by_us or code in (LOST_ANOTHER, -signal.SIGTERM):
            return 4
        if code == -signal.SIGABRT:  # torch's threads may end their process so when another is lost
            return 3
        return 0 if code < 0 else 1 if code == EXPLAINED else 2

    failed = [worker for worker in workers if worker.code]
    return min(failed, key=lambda worker: (weight(worker), worker.rank), default=None)


def _explain(failed: Worker) -> None:
    """Show why, unless the first rank has shown it on the terminal."""
    if failed.log is None or failed.code == -signal.SIGKILL:
        return
    if failed.code == EXPLAINED:
        print(failed.tail(), file=sys.stderr)
        return
    print(f"The end of {failed.log}:\n{failed.tail()}", file=sys.stderr)


def _fate(worker: Worker) -> str:
    code = worker.code or 0
    if code < 0:
        return f"Process {worker.rank} was killed by {signal.Signals(-code).name}"
    return f"Process {worker.rank} ended with exit code {code}"


class _PassingOn:
    """Hands SIGTERM and Ctrl-C to the workers, which are in process groups of their own, so that each gets it once."""

    def __init__(self) -> None:
        self.received = 0
        self.workers: list[Worker] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_PassingOn":
        if threading.current_thread() is threading.main_thread():
            for number in STRICKEN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received += 1
        for worker in self.workers:
            if self.received > 2:  # who asks a third time does not want to wait
                worker.kill()
            else:
                worker.send(number)
