"""Joining the processes of a run: who am I, where are the others, and an end that says what happened.

    hanlin train RECIPE --nproc 4            `core.launch` on one machine
    torchrun --nnodes 2 --nproc-per-node 4   torch's launcher on each machine
    srun -n 8                                Slurm
    mpirun -np 8                             Open MPI

The command is the same in all four; a process reads its place from the environment.

How a process ends decides what its launcher makes of it, so the end is made by hand where torch would spoil it: a
thread of gloo that frees its last tensor asks for Python's lock, and if the interpreter is just closing, Python before
3.14 ends that thread in a way that C++ answers with SIGABRT.
"""

import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist

from hanlin.core.device import choose_device
from hanlin.core.errors import HanlinError
from hanlin.core.launch import LAUNCHER, LOST_ANOTHER

Backend = Literal["gloo", "nccl", "mpi"]
TIMEOUT = timedelta(minutes=30)  # of a collective; the slowest step of a run must be shorter
LAST_TENSORS = 0.1  # seconds in which gloo's threads free what they hold, before the interpreter closes
ORPHANED = 60.0  # seconds that a process without its launcher gets to start or to finish, when it takes no SIGTERM
LOST = re.compile(  # what gloo, NCCL and the store say when a process that they talk to is gone
    r"connection (closed|reset|refused)|broken pipe|remote process exited|peer closed|pair closure"
    r"|socket (closed|timeout)|timed? ?out|nccl (communicator was )?abort|failed to recv|(read|write) ?error",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Seat:
    """One process's place among those that its launcher started. local: within this machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Seat | None":
        """From the variables of torchrun, of a Slurm step or of Open MPI; None for a process on its own."""
        for names, address in ((_TORCHRUN, None), (_SLURM, _slurm_address), (_OPEN_MPI, None)):
            found = [next((environment[n] for n in name.split("|") if n in environment), None) for name in names]
            if found[0] is None or found[1] is None or (names is _SLURM and "SLURM_STEP_ID" not in environment):
                continue  # a Slurm batch script itself is no step: only what `srun` starts in it is
            try:
                rank, world = int(found[0]), int(found[1])
                local_rank, local_world = int(found[2] or 0), int(found[3] or 0)
                port = int(environment.get("MASTER_PORT") or _default_port(environment))
            except ValueError as error:
                raise HanlinError(f"The launcher's variables {', '.join(names)} are not numbers: {error}.") from error
            if not 0 <= rank < world:
                raise HanlinError(
                    f"The launcher says that this is process {rank} of {world}; expected 0 to {world - 1}."
                )
            where = environment.get("MASTER_ADDR") or (address(environment) if address else None)
            if where is None and local_world == world:
                where = "127.0.0.1"
            if where is None:
                raise HanlinError(
                    f"This is process {rank} of {world} on several machines: set MASTER_ADDR to the name of the "
                    "machine of process 0, and MASTER_PORT to a free port of it."
                )
            return cls(rank, world, local_rank, local_world, where, port)
        return None


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS|SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
_OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
)  # fmt: skip


@contextmanager
def join_group(
    device: str = "auto", *, backend: Backend | None = None, timeout: timedelta = TIMEOUT
) -> Generator[torch.device]:
    """Be one of the processes that a launcher started, inside; a process on its own stays one. Yields its device.

    device: "auto", "cpu" or "cuda": each process of a machine takes the GPU of its local rank. backend: None: nccl on
    GPUs, gloo on CPUs. `HanlinError` if the others are not found. When another process is lost inside, this one ends
    at once with a line instead of a traceback and exit code `LOST_ANOTHER`, which a launcher answers by starting all
    again: what is to be finished is finished inside.
    """
    seat = Seat.read(os.environ)
    if seat is None or seat.world == 1:
        yield choose_device(device)
        return
    place = _own_device(device, seat)
    _end_with_launcher()
    _initialise(seat, place, backend, timeout)
    try:
        yield place
        if dist.is_initialized():  # not after an error: the others may never answer
            dist.destroy_process_group()
    except RuntimeError as error:
        sign = LOST.search(str(error))
        if sign is None and not isinstance(error, dist.DistError):
            raise
        reason = sign[0].lower() if sign else str(error).strip().splitlines()[0]
        print(f"Process {seat.rank} ends: another process of this run was lost ({reason}).", file=sys.stderr)
        _leave(LOST_ANOTHER)
    finally:
        time.sleep(LAST_TENSORS)  # leaves Python's lock to gloo's threads


def first_host(names: str) -> str:
    """The first of a list of machines as Slurm writes it: "gpu[003-004,9],login" -> "gpu003"."""
    head = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,\[]*)", names.strip())
    if head is None:
        raise HanlinError(f"SLURM_NODELIST {names!r} names no machine; set MASTER_ADDR to that of process 0.")
    prefix, numbers, suffix = head.groups()
    return prefix + (re.split(r"[,-]", numbers)[0] if numbers else "") + suffix


def _slurm_address(environment: Mapping[str, str]) -> str:
    names = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
    return first_host(names or environment.get("SLURM_JOB_NODELIST", ""))


def _default_port(environment: Mapping[str, str]) -> int:
    """The same in all processes of a job, another one in another job."""
    return 20000 + int(environment.get("SLURM_JOB_ID", 9500)) % 20000


def _own_device(name: str, seat: Seat) -> torch.device:
    device = choose_device(name)
    if device.type != "cuda" or device.index is not None:
        return device
    count = torch.cuda.device_count()
    needed = max(seat.local_rank + 1, seat.local_world)
    if needed > count:
        raise HanlinError(
            f"{needed} processes were started on this machine, which has {count} GPU{'s' * (count != 1)}: one process "
            f"uses one. Start {count} (--nproc {count}), or set the device to cpu."
        )
    torch.cuda.set_device(seat.local_rank)
    return torch.device("cuda", seat.local_rank)


def _initialise(seat: Seat, device: torch.device, backend: Backend | None, timeout: timedelta) -> None:
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    there = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    if not there[backend]():
        have = ", ".join(name for name, check in there.items() if check())
        raise HanlinError(f"This PyTorch was built without the backend {backend}; it has: {have}.")
    if backend == "nccl" and device.type != "cuda":
        raise HanlinError("The backend nccl needs GPUs; on CPUs it is gloo, or mpi where PyTorch has it.")
    try:
        if backend == "mpi":  # it asks MPI itself who it is
            dist.init_process_group("mpi")
            return
        meet: dict[str, Any] = {"init_method": f"tcp://{seat.address}:{seat.port}"}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            meet = {"store": _fresh_corner(seat, timeout)}
        dist.init_process_group(
            backend, **meet, rank=seat.rank, world_size=seat.world, timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if LAUNCHER in os.environ and re.search("address already in use|EADDRINUSE", str(error), re.IGNORECASE):
            print(f"Port {seat.port} was taken meanwhile.", file=sys.stderr)
            raise SystemExit(LOST_ANOTHER) from None  # the launcher tries another one
        raise HanlinError(
            f"Process {seat.rank} of {seat.world} could not join the others at {seat.address}:{seat.port}: {reason} "
            "All must be started, and reach that address (MASTER_ADDR, MASTER_PORT)."
        ) from error


def _fresh_corner(seat: Seat, timeout: timedelta) -> dist.Store:
    """A corner of torchrun's store in which no earlier try of this run has written.

    Across machines torchrun keeps one store for all tries and its workers find there the addresses of those that are
    dead (pytorch issues 135712, 167288); the number of the try, which could tell them apart, differs between machines.
    So the first process draws a name and tells it to each of the others under a question that only a living one asked.
    """
    store = dist.TCPStore(seat.address, seat.port, seat.world, is_master=False, timeout=timeout)
    meeting = dist.PrefixStore("hanlin", store)
    own = secrets.token_hex(8)
    if seat.rank:
        meeting.set(f"question-{seat.rank}", own)
        name = meeting.get(f"answer-{own}").decode()
        meeting.set(f"{name}-{seat.rank}", "heard")
        return dist.PrefixStore(name, store)
    missing, end = set(range(1, seat.world)), time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if meeting.check([f"question-{rank}"]):  # perhaps an old one: its answer harms nobody
                meeting.set(f"answer-{meeting.get(f'question-{rank}').decode()}", own)
        missing = {rank for rank in missing if not meeting.check([f"{own}-{rank}"])}
        if missing and time.monotonic() > end:
            raise RuntimeError(f"no sign of the processes {sorted(missing)} for {timeout.total_seconds():.0f} s.")
        time.sleep(0.02)
    return dist.PrefixStore(own, store)


def _leave(code: int) -> NoReturn:
    """End this process without closing the interpreter, which would wait for, or stumble over, threads of torch."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed by whoever read it
            stream.flush()
    os._exit(code)


def _end_with_launcher() -> None:
    """Save and end, as at SIGTERM, when the launcher is gone: nobody would end this process later."""
    launcher = int(os.environ.get(LAUNCHER, "0"))
    if launcher == 0 or os.getppid() != launcher:
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        end = time.monotonic() + ORPHANED
        while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and time.monotonic() < end:
            time.sleep(0.1)  # it starts, or writes its last checkpoint because another was asked first: not to be cut
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
