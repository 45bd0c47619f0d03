"""Pages of keys and values on disk: what memory had to give up is read back instead of computed again.

One file a page (`page_file`), named by the hash of its key and of the identity of the model that wrote it; the key is
the hash of all tokens up to the page's end. So equal names are equal contents: several processes can share a folder, a
page is never changed, and pages of another model are never found, they only age and make room. An error of the disk is
a page not stored or not found, with one notice, never an error of a request.

One thread writes, one reads: a load never waits for a store. The least recently used page goes first; the time of the
last use is the file's mtime, so the order survives a restart. The bound counts whole blocks of 4 KiB and holds at every
moment for one process. Several in one folder see each other's pages when they look at the folder again (every half
minute of writing); in between each keeps the bound over the pages it knows.
"""

import contextlib
import hashlib
import math
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.progress import say
from hanlin.engine.page_file import KEY_BYTES, OnDisk, footprint, list_pages, page_path, read_page, write_page

QUEUE_BYTES = 64 << 20  # pages waiting to be written hold no more memory than this (at least one page)
RETRY_SECONDS = 30.0  # after an error of the disk nothing is written for so long
LOOK_SECONDS = 30.0  # so often, while writing, the folder is looked at for the pages of others,
LONG_LOOK = 0.3  # less often where one look takes longer than this: 1 % of the time (60,000 pages took it, cached)


@dataclass(frozen=True)
class DiskStats:
    """pages, bytes: on disk now, in whole blocks, those of other models too. The rest counts since the start."""

    pages: int = 0
    bytes: int = 0
    stored: int = 0  # written
    loaded: int = 0
    dropped: int = 0  # not written: the queue was full, or the disk
    evicted: int = 0
    corrupt: int = 0


class DiskTier:
    """Pages of keys and values on disk, one file a page. Call `close` (or use `with`) to write what is queued.

    limit_bytes: what all pages in `folder` may take. page_bytes: bytes of a page, or of a page of each group.
    identity: whatever the bytes in a page depend on besides the key (weights, dtype, layout). on_error: is told one
    line, from another thread, when writing stops and at the first damaged page.
    queue_bytes: of pages waiting to be written. retry_seconds: no stores for so long after an error of the disk.
    look_seconds: between looks at the folder for pages of other processes. clock: seconds, for the last two.

    HanlinError: the folder cannot be written, or not even one page fits.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        limit_bytes: int,
        page_bytes: Mapping[int, int] | int,
        identity: bytes,
        on_error: Callable[[str], None] = say,
        queue_bytes: int = QUEUE_BYTES,
        retry_seconds: float = RETRY_SECONDS,
        look_seconds: float = LOOK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._lengths = {page_bytes} if isinstance(page_bytes, int) else set(page_bytes.values())
        largest = footprint(max(self._lengths))
        if limit_bytes < largest:
            raise HanlinError(
                f"The KV cache on disk may take {limit_bytes} bytes, but one page of this model takes {largest}. "
                "Give it more, or none."
            )
        _check_writable(self.folder)
        self._identity = hashlib.blake2b(identity, digest_size=16).digest()
        self._on_error = on_error
        self._queue_bytes, self._retry_seconds, self._look_seconds = queue_bytes, retry_seconds, look_seconds
        self._clock = clock

        # all below is changed with the lock held; `in` reads without
        self._changed = threading.Condition()
        self._pages: OrderedDict[bytes, OnDisk] = OrderedDict()  # on disk, the longest unused first
        self._bytes = 0
        self._queue: OrderedDict[bytes, tuple[bytes, bytes]] = OrderedDict()  # being written or waiting for it
        self._queued = 0  # bytes of these
        self._touched: dict[bytes, int] = {}  # used in memory, the file does not know yet
        self._counts = dict.fromkeys(("stored", "loaded", "dropped", "evicted", "corrupt"), 0)
        self._paused_until = self._look_at = -math.inf
        self._pausing = self._looked = self._closing = self._ended = False
        self._busy = True  # the writer

        self._writer = threading.Thread(target=self._write_on, name="kv-disk-writer", daemon=True)
        self._writer.start()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kv-disk-reader")

    def __contains__(self, key: bytes) -> bool:
        """Whether a load of `key` would probably find it (no I/O; nothing is found before the first look ended)."""
        digest = self._digest(key)
        return digest in self._pages or digest in self._queue

    def store(self, key: bytes, page: Tensor) -> None:
        """Write `page` (contiguous, any dtype or device) later; its bytes are copied now.

        A page that is there already counts as used now. Where the queue or the disk is full the page is dropped.
        """
        digest, numbers = self._digest(key), self._as_bytes(page)
        with self._changed:
            if digest in self._pages:
                self._use(digest, time.time_ns())
                self._touched[digest] = self._pages[digest].used
                self._changed.notify_all()
                return
            if digest in self._queue:
                return
            full = self._queue and self._queued + numbers.nbytes > self._queue_bytes
            if full or self._closing or self._ended or self._clock() < self._paused_until:
                self._counts["dropped"] += 1
                return
            self._queue[digest] = key, bytes(numbers)
            self._queued += numbers.nbytes
            self._changed.notify_all()

    def load(self, key: bytes, into: Tensor) -> Future[bool]:
        """Read a page into `into` (contiguous, in main memory). The future never fails and says whether it was found.

        False: there is no such page, or it was damaged, which removes it; then `into` holds anything. A page that is
        not known here but was written by another process is found too.
        """
        if into.device.type != "cpu":
            raise ValueError(f"a page is loaded into main memory, not into {into.device}")
        digest, numbers = self._digest(key), self._as_bytes(into)
        with self._changed:
            if not self._closing:
                return self._reader.submit(self._read, digest, key, numbers, self._queue.get(digest))
        missed: Future[bool] = Future()
        missed.set_result(False)
        return missed

    def flush(self) -> None:
        """Wait until the folder has been looked at and all that was stored so far is written or dropped."""
        with self._changed:
            self._changed.wait_for(self._is_idle)

    def close(self) -> None:
        """Finish all loads and stores that were asked for; later stores are dropped and later loads find nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join()
        self._reader.shutdown()

    def __enter__(self) -> "DiskTier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> DiskStats:
        with self._changed:
            return DiskStats(len(self._pages), self._bytes, **self._counts)

    # ------------------------------------------------------------------------------------------------ the writer

    def _write_on(self) -> None:
        try:
            while True:
                try:
                    if self._clock() >= self._look_at:
                        self._look()
                    with self._changed:
                        self._busy = False
                        self._changed.notify_all()  # somebody may wait in `flush`
                        self._changed.wait_for(lambda: self._queue or self._touched or self._closing)
                        self._busy = True
                        touched, self._touched = self._touched, {}
                        work = next(iter(self._queue.items()), None)
                        if not work and not touched:
                            return
                    for digest, used in touched.items():
                        with contextlib.suppress(FileNotFoundError):
                            os.utime(self._path(digest), ns=(used, used))
                    if not self._looked:  # the first look failed: without one the bound is not known
                        self._look()
                    if work:
                        self._write(work[0], *work[1])
                except OSError as error:
                    self._pause(error)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _write(self, digest: bytes, key: bytes, page: bytes) -> None:
        size = footprint(len(page))
        self._make_room(self.limit_bytes - size)
        used = time.time_ns()
        write_page(self._path(digest), self._identity, key, page, used)
        with self._changed:
            self._remember(digest, OnDisk(size, used))
            if self._queue.pop(digest, None):
                self._queued -= len(page)
            self._counts["stored"] += 1
            self._pausing = False

    def _make_room(self, limit: int) -> None:
        """Remove the longest unused pages until the rest takes no more than `limit` bytes."""
        while True:
            with self._changed:
                if self._bytes <= limit:
                    return
                digest, page = next(iter(self._pages.items()))
            path = self._path(digest)
            with contextlib.suppress(FileNotFoundError):
                used = path.stat().st_mtime_ns
                if used > page.used:  # by another process
                    with self._changed:
                        self._use(digest, used)
                    continue
                path.unlink()
                with self._changed:
                    self._counts["evicted"] += 1
            self._forget(digest)

    def _look(self) -> None:
        """Learn from the folder which pages there are, remove what a killed process left behind, keep the bound."""
        began = self._clock()
        found = list_pages(self.folder)
        with self._changed:
            known = list(self._pages)
        new = sorted((page.used, digest) for digest, page in found.items() if digest not in self._pages)
        with self._changed:
            for digest in known:
                if digest not in found:
                    self._forget(digest)
            for _, digest in new:  # behind ours: pages of others count as used when they are first seen
                self._remember(digest, found[digest])
            if not self._looked:  # what was loaded before the first look has been used since
                for digest in known:
                    self._use(digest)
        self._make_room(self.limit_bytes)
        took = self._clock() - began
        with self._changed:
            self._looked = True
            self._look_at = began + self._look_seconds * max(1.0, took / LONG_LOOK)

    def _pause(self, error: OSError) -> None:
        with self._changed:
            told, self._pausing = self._pausing, True
            self._paused_until = self._clock() + self._retry_seconds
            self._look_at = max(self._look_at, self._paused_until)
            self._counts["dropped"] += len(self._queue)
            self._queue.clear()
            self._queued = 0
        if not told:
            self._on_error(
                f"KV cache on disk: {self.folder} cannot be written ({error.strerror or error}). It stores nothing for "
                "now and tries again by itself; requests are not affected."
            )

    def _is_idle(self) -> bool:
        return self._ended or not (self._busy or self._queue or self._touched)

    # ------------------------------------------------------------------------------------------------ the reader

    def _read(self, digest: bytes, key: bytes, into: memoryview, queued: tuple[bytes, bytes] | None) -> bool:
        path = self._path(digest)
        if queued is not None:
            if len(queued[1]) != into.nbytes:
                return False
            into[:] = queued[1]
            with self._changed:
                self._counts["loaded"] += 1
            return True
        try:
            stream = path.open("rb", buffering=0)
        except FileNotFoundError:  # removed by another process
            self._forget(digest)
            return False
        except OSError:  # too many open files, say: the page may be fine
            return False
        with stream:
            try:
                whole = read_page(stream, self._identity, key, into)
            except OSError:
                whole = False
        if not whole:
            self._remove_damaged(digest, path)
            return False
        used = time.time_ns()
        with contextlib.suppress(OSError):  # a folder that became read-only can still be read
            os.utime(path, ns=(used, used))
        with self._changed:
            self._remember(digest, OnDisk(footprint(into.nbytes), used))
            self._counts["loaded"] += 1
        return True

    def _remove_damaged(self, digest: bytes, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
        self._forget(digest)
        with self._changed:
            self._counts["corrupt"] += 1
            first = self._counts["corrupt"] == 1
        if first:
            self._on_error(f"KV cache on disk: {path} was damaged; it is removed and computed again.")

    # ------------------------------------------------------------------------------------------- what is on disk

    def _digest(self, key: bytes) -> bytes:
        if not 16 <= len(key) <= KEY_BYTES:
            raise ValueError(f"a page's key has 16 to {KEY_BYTES} bytes, not {len(key)}")
        return hashlib.blake2b(key, digest_size=16, key=self._identity).digest()

    def _path(self, digest: bytes) -> Path:
        return page_path(self.folder, digest)

    def _as_bytes(self, page: Tensor) -> memoryview:
        """The bytes of a tensor: its own memory where that is main memory, else a copy."""
        if not page.is_contiguous():
            raise ValueError("a page is one contiguous run of bytes")
        numbers = page.detach().reshape(-1).view(torch.uint8).cpu().numpy().data
        if numbers.nbytes not in self._lengths:
            raise ValueError(f"a page has {sorted(self._lengths)} bytes, not {numbers.nbytes}")
        return numbers

    def _remember(self, digest: bytes, page: OnDisk) -> None:
        """Put a page last (lock held)."""
        known = self._pages.pop(digest, None)
        self._bytes += page.size - (known.size if known else 0)
        self._pages[digest] = page

    def _use(self, digest: bytes, used: int = 0) -> None:
        """Put a page that is there last (lock held)."""
        if page := self._pages.get(digest):
            self._remember(digest, OnDisk(page.size, max(page.used, used)))

    def _forget(self, digest: bytes) -> None:
        with self._changed:
            if known := self._pages.pop(digest, None):
                self._bytes -= known.size
            self._touched.pop(digest, None)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # has no name where the system can: nothing is left after a kill
            pass
    except OSError as error:
        raise HanlinError(
            f"The KV cache on disk cannot use the folder {folder}: {error.strerror or error}. "
            "Name a folder that can be written, or go without the disk."
        ) from error
