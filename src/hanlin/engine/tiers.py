"""The tiers below the device's pages: the host's memory, then the disk.

    device ──evicted──▶ host ──evicted──▶ disk ──too old──▶ gone
       ▲                  │                │
       └────── found ─────┴──── loaded ────┘

Contents that the device gives up go down instead of being lost; a prompt that begins like them finds them again. What
lies on the host is copied at once, what lies on disk is read by a thread of `DiskTier`, while the request waits in
`loading` and holds up nobody. A page that cannot be read, or whose checksum is wrong, is computed again.

The host's pages also hold what a single sequence has too much of (`spill`): they stand in its table as negative
numbers, and attention streams them (`paged_cache.Step`).

The disk never blocks: `DiskTier.store` copies into a bounded queue, and drops what does not fit.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from hanlin.engine.disk_tier import DiskTier
from hanlin.engine.page_pool import PagePool
from hanlin.engine.paged_cache import PagedCache
from hanlin.engine.tables import Table, Tables

FLUSHED = 16  # pages at a time, when all are written down
AHEAD = 256 << 20  # bytes of a group's pages that are touched before they are needed, while nothing else is to do
WARMED = 8 << 20  # at a time


class Tiers:
    """tables: the device's; cache: its memory and the host's; disk: None without one."""

    def __init__(self, tables: Tables, cache: PagedCache, disk: DiskTier | None = None) -> None:
        self.tables, self.cache, self.disk = tables, cache, disk
        self.host = [
            PagePool(len(store), first=1, on_evict=partial(self._to_disk, group))
            for group, store in enumerate(cache.host_store)
        ]
        self.loaded = 0
        self._warm = [0] * len(cache.store)  # of each group, the pages up to here were touched
        tables.host = self.host
        if self.host or disk is not None:
            tables.lower = self._has
            for group, pool in enumerate(tables.pools):
                pool.on_evict = partial(self._demote, group)

    @property
    def host_pages(self) -> int:
        return sum(pool.known for pool in self.host)

    @property
    def disk_pages(self) -> int:
        return 0 if self.disk is None else self.disk.stats.pages

    def load(self, table: Table, loads: Sequence[tuple[int, int, bytes]]) -> list[tuple[int, int, Future[bool]]]:
        """Bring contents into pages of the device: (group, page, key) each -> (group, index in the table, whether it
        came)."""
        self._catch_up()
        started = []
        for group, page, key in loads:
            target = self.cache.store[group][page]
            done: Future[bool] = Future()
            host = self.host[group].find(key) if self.host else None
            if host is not None:
                target.copy_(self.cache.host_store[group][host])
                self.host[group].hold(host)  # used last
                self.host[group].drop(host)
                done.set_result(True)
            elif self.disk is not None and key in self.disk:
                done = _read(self.disk, key, target)
            else:
                done.set_result(False)
            self.loaded += 1
            started.append((group, table.pages[group].index(page), done))
        return started

    def spill(self, table: Table, computed: int) -> bool:
        """Move the oldest full page of a sequence to the host; False where there is none, or no room."""
        if not self.host:
            return False
        for group, (spec, pool) in enumerate(zip(self.tables.groups, self.tables.pools, strict=True)):
            if spec.window is not None or not self.host[group].free:
                continue
            held = table.pages[group]
            for index in range(min(len(held), computed // self.tables.page)):
                if held[index] > 0:
                    target = self.host[group].take()
                    self._catch_up()
                    self.cache.host_store[group][target].copy_(self.cache.store[group][held[index]])
                    pool.drop(held[index])
                    held[index] = -target
                    return True
        return False

    def warm(self) -> bool:
        """Touch some pages that were never used, as long as fewer than `AHEAD` bytes lie ready; False: none is left to
        touch. The first touch of memory can cost more than all that is computed into it."""
        for group, (store, pool) in enumerate(zip(self.cache.store, self.tables.pools, strict=True)):
            size = self.cache.page_bytes(group)
            ready = min(len(store), pool.highest + AHEAD // size)
            first = max(self._warm[group], 1)
            if first < ready:
                last = min(ready, first + max(1, WARMED // size))
                store[max(first, pool.highest + 1) : last] = 0  # nothing was ever written there
                self._warm[group] = last
                return True
        return False

    def close(self) -> None:
        """Write down what is known, so that the next start finds it."""
        if self.disk is None:
            return
        tiers = [(self.cache.host_store, self.host), (self.cache.store, self.tables.pools)]
        for stores, pools in tiers:  # what was used last is written last, and so found longest
            for store, pool in zip(stores, pools, strict=True):
                for number, (page, key) in enumerate(pool.contents()):
                    self.disk.store(key, store[page])
                    if number % FLUSHED == FLUSHED - 1:  # its queue is bounded
                        self.disk.flush()
        self.disk.close()

    def check(self) -> None:
        for pool in self.host:
            pool.check()

    def _catch_up(self) -> None:
        """Do now what the next step was to begin with: it may still read, or wipe, what is overwritten here."""
        self.cache.wipe(self.tables.wipes)
        self.cache.copy(self.tables.copies)
        self.tables.wipes.clear()
        self.tables.copies.clear()

    def _has(self, key: bytes) -> bool:
        group = key[-1]
        return bool(self.host and self.host[group].find(key) is not None) or (
            self.disk is not None and key in self.disk
        )

    def _demote(self, group: int, page: int, key: bytes) -> None:
        """The device gives up a page."""
        self._catch_up()
        contents = self.cache.store[group][page]
        pool = self.host[group] if self.host else None
        if pool is not None and pool.find(key) is not None:
            return
        if pool is not None and pool.free:
            target = pool.take()
            self.cache.host_store[group][target].copy_(contents)
            pool.publish(target, key)
            pool.drop(target)
        elif self.disk is not None:
            self.disk.store(key, contents)

    def _to_disk(self, group: int, page: int, key: bytes) -> None:
        if self.disk is not None:
            self.disk.store(key, self.cache.host_store[group][page])


def _read(disk: DiskTier, key: bytes, target: Tensor) -> "Future[bool]":
    """From disk into a page of the device."""
    if target.device.type == "cpu":
        return disk.load(key, target)
    staging = torch.empty_like(target, device="cpu")
    came: Future[bool] = Future()

    def move_on(read: "Future[bool]") -> None:
        if read.result():
            target.copy_(staging)
        came.set_result(read.result())

    disk.load(key, staging).add_done_callback(move_on)
    return came
