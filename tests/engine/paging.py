"""A paged cache for a few sequences, whose pages lie in no order: what tests need to read tokens in pieces."""

from collections.abc import Sequence

import torch

from hanlin.engine.page_pool import PagePool
from hanlin.engine.paged_cache import PagedCache, Step
from hanlin.engine.tables import Tables, groups_of
from hanlin.models.config import ModelConfig


class Book:
    """`sequences` of up to `length` tokens each."""

    def __init__(
        self, config: ModelConfig, *, sequences: int, length: int, dtype: torch.dtype, page: int = 4, extra: int = 0
    ) -> None:
        pages = sequences * (-(-length // page)) + 1
        self.groups = groups_of(config, extra=extra)
        self.cache = PagedCache(config, pages=[pages] * len(self.groups), dtype=dtype, page=page, extra_layers=extra)
        self.pools = [PagePool(pages, first=1) for _ in self.groups]
        for pool in self.pools:  # backwards and forwards, so that neighbours in a sequence are none in memory
            taken = [pool.take() for _ in range(pool.size)]
            for one in (*taken[::2], *reversed(taken[1::2])):
                pool.drop(one, forget=True)
        self.tables = Tables(self.groups, self.pools, page)
        self.rows = [self.tables.start(b"%d" % i) for i in range(sequences)]
        self.held = [0] * sequences

    def step(self, rows: Sequence[int], new: int | Sequence[int], *, flat: bool = False) -> Step:
        """One pass that appends `new` tokens to each of `rows`; windows let go of what they have passed."""
        counts = [new] * len(rows) if isinstance(new, int) else list(new)
        starts = [self.held[row] for row in rows]
        for row, start, count in zip(rows, starts, counts, strict=True):
            self.tables.publish(self.rows[row], list(range(start)), start)
            assert self.tables.grow(self.rows[row], start, start + count)
            self.held[row] += count
        self.cache.copy(self.tables.copies)
        self.tables.copies.clear()
        tables = [[list(held) for held in self.rows[row].pages] for row in rows]
        return self.cache.step(starts, counts, tables, rows=not flat)
