"""Writing while training goes on: the tensors are copied into host memory, then a thread of low priority writes them.

    step 20   copy ▏ step 21, 22, 23 ...            the loop waits for the copy only
              thread   ▏ hash, write, fsync, rename

The copies live in buffers that are kept from one save to the next (pinned for CUDA), so that a save touches no new
memory. One write is in flight at most: the next save waits for it first. What goes wrong in the thread is raised where
the loop asks next, at the next save or at the end. Hashing and writing leave Python's lock to the training.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

NICE = 5  # how much the thread steps back behind the training (0 to 19)


class HostCopies:
    """Copies of tensors in memory of the host, in buffers that the next copy of the same tensors uses again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Host memory held."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies that stay what they are until the next call; complete when it returns."""
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=tensor.is_cuda)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._buffers)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._buffers.get(name)
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            return kept
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class BackgroundWriter:
    """Runs one job at a time in a thread of low priority."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job; the one before must have been waited for."""
        if self._thread is not None:
            raise RuntimeError("A job is in flight; `wait` first.")
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint")  # not a daemon: it finishes
        self._thread.start()

    def wait(self) -> BaseException | None:
        """Until the job is done; what went wrong in it, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _run(self, job: Callable[[], None]) -> None:
        step_back()
        try:
            job()
        except BaseException as error:
            self._error = error


def step_back() -> None:
    """Lower the priority of the calling thread, where a thread has one of its own (Linux)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
