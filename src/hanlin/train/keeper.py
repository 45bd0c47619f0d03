"""`Keeper`: the checkpoints of a run that one or several processes share, written at once or while training goes on.

save     every process says which pieces it holds, each piece gets one writer, each writes its file;
         the first process waits for the files, writes the manifest, renames, deletes what is no longer kept
newest   the first process verifies, sets damaged ones aside and decides; the others open the same
"""

import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.files import disk_errors
from hanlin.core.runs import Run
from hanlin.parallel.processes import Processes
from hanlin.train.background import BackgroundWriter, HostCopies
from hanlin.train.checkpoint import (
    Checkpoint,
    finish_parts,
    newest_checkpoint,
    prune_checkpoints,
    shared_folder,
    write_checkpoint,
    write_part,
)
from hanlin.train.reader import CheckpointReader, open_checkpoint
from hanlin.train.sharded import Held, Place, assign

WAIT = timedelta(hours=2)  # for the slowest disk of a run


class Keeper:
    """As a context manager it finishes what is in flight; left by an error, without asking the other processes.

    Every process of the group makes one, and all call `save`, `newest` and `finish` at the same places.
    background: write in a thread, from copies of the tensors (`train.background`).
    """

    def __init__(
        self,
        run: Run,
        processes: Processes,
        *,
        keep_last: int,
        notice: Callable[[str], None],
        background: bool = False,
    ) -> None:
        self.run, self._processes, self._keep_last, self._notice = run, processes, keep_last, notice
        self._background = background
        self._copies, self._writer = HostCopies(), BackgroundWriter()
        self._error: BaseException | None = None
        self._pending = False  # whether the processes have still to agree that the last save went well
        self._leaving = threading.Event()
        self._group: Any = None  # of its own: gloo, whatever the training's is, and more patient
        if processes.world > 1:
            self._group = dist.new_group(backend="gloo", timeout=WAIT)

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
            return
        self._leaving.set()
        self._settle()
        if self._error is not None:
            self._notice(f"The last checkpoint could not be written: {self._error}")

    def newest(self) -> CheckpointReader | None:
        """See `newest_checkpoint`; the same one in every process."""
        self.finish()
        if self._processes.world == 1:
            return newest_checkpoint(self.run, self._notice)
        found: CheckpointReader | None = None
        error: BaseException | None = None
        if self._processes.first:
            try:
                found = newest_checkpoint(self.run, self._notice)
            except HanlinError as reason:
                error = reason
        self._agree(error)
        step = self._exchange(found.step if found else None)[0]
        if step is not None and found is None:
            try:
                found = open_checkpoint(self.run.checkpoint(step), verify=False)
            except HanlinError as reason:
                error = HanlinError(
                    f"{reason} The first process sees this checkpoint: the run folder must lie where all machines of "
                    "the run see it."
                )
        self._agree(error)
        return found

    def save(self, checkpoint: Checkpoint, best: int | None) -> None:
        """Write, then delete those that are no longer kept; `best` is a step to keep besides.

        Waits for the save before. In the background it returns once the tensors are copied; what goes wrong later is
        raised by the next call of this object.
        """
        self.finish()
        folder, rank = self.run.checkpoint(checkpoint.step), self._processes.rank
        held = [each.simplest() for each in checkpoint.held]
        offers = self._offers(held, folder)
        state = checkpoint.encoded() if self._processes.first else b""
        if _first_holds_all(offers):
            mine = {each.name: each.tensor for each in held} if self._processes.first else {}
            written = None
        else:
            writers = assign(offers)
            mine = {held[number].name: held[number].tensor for number in writers[rank]}
            written = [[offers[r][number] for number in numbers] for r, numbers in enumerate(writers)]
        tensors = self._copies.take(mine) if self._background else mine

        def job() -> None:
            self._write(folder, checkpoint.step, state, tensors, written)
            if self._processes.first:
                prune_checkpoints(self.run, self._keep_last, best)

        self._pending = True
        if self._background:
            self._writer.submit(job)
            return
        try:
            job()
        except Exception as error:
            self._error = error
        self.finish()

    def finish(self) -> None:
        """Until the last save is on the disk in every process; what went wrong in one of them is raised in all."""
        self._settle()
        error, self._error = self._error, None
        if self._pending:
            self._pending = False
            self._agree(error)

    def last_good(self) -> str:
        """A sentence about where an error can go back to."""
        self._settle()
        there = self.run.checkpoints()
        if not there:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {there[-1][1]}."

    def _settle(self) -> None:
        """Until this process's thread is done."""
        self._error = self._writer.wait() or self._error

    def _offers(self, held: list[Held], folder: Path) -> list[list[Place]]:
        """What every process holds, after the first has made the folder to write into."""
        error: BaseException | None = None
        if self._processes.world > 1 and self._processes.first:
            try:
                with disk_errors(folder):
                    shutil.rmtree(shared_folder(folder), ignore_errors=True)
                    shared_folder(folder).mkdir(parents=True)
            except (HanlinError, OSError) as reason:
                error = reason
        self._agree(error)
        return self._exchange([each.place for each in held])

    def _write(
        self, folder: Path, step: int, state: bytes, tensors: dict[str, Tensor], written: list[list[Place]] | None
    ) -> None:
        if written is None:
            if self._processes.first:
                write_checkpoint(folder, step, state, tensors)
                shutil.rmtree(shared_folder(folder), ignore_errors=True)
            return
        error: BaseException | None = None
        try:
            write_part(folder, self._processes.rank, tensors)
        except BaseException as reason:
            error = reason
        if self._processes.first:
            with suppress(HanlinError) if error else nullcontext():  # its own reason says more
                finish_parts(folder, step, state, written, hurried=self._hurried)
        if error is not None:
            raise error

    def _hurried(self) -> bool:
        return self._leaving.is_set() or not threading.main_thread().is_alive()

    def _exchange(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self._processes.world
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _agree(self, error: BaseException | None) -> None:
        """Raise this process's error; or a `HanlinError` if another process has one."""
        reasons = self._exchange(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise HanlinError(f"Process {rank} of this run: {reason}")


def _first_holds_all(offers: list[list[Place]]) -> bool:
    """Whether every tensor is whole in the first process: then it writes files that anybody reads."""
    whole = {place.name for place in offers[0] if place.whole}
    return all(place.whole and place.name in whole for places in offers for place in places)
