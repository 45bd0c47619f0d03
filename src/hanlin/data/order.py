"""Which sample stands in which row: pure functions of (seed, global sample number).

Sample g = step * rows_per_step + row. Within epoch e = g // n the order is a permutation seeded by (seed, e); a mixture
first assigns g to a source by weight, then counts that source's own samples.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive

BLOCK = 4096  # samples over which a mixture's weights hold exactly (to one sample a source)


def shuffled(sample: int, count: int, seed: int) -> int:
    """Which of `count` items is global sample `sample`: every epoch of `count` samples shows each item once."""
    epoch, place = divmod(sample, count)
    return int(_permutation(count, seed, epoch)[place])


def mixed(sample: int, weights: Sequence[float], seed: int) -> tuple[int, int]:
    """(source, how many samples of that source came before): weights need not sum to 1.

    Over every block of `BLOCK` samples each source gets its share to within one sample; inside a block the order is a
    permutation seeded by (seed, block).
    """
    block, place = divmod(sample, BLOCK)
    key = tuple(map(float, weights))
    sources, before = _block(block, key, seed)
    return int(sources[place]), int(before[place])


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(derive(seed, "shuffle", epoch)).permutation(count)


@lru_cache(maxsize=8)
def _block(block: int, weights: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    if not weights or min(weights) < 0 or not sum(weights) > 0:
        raise HanlinError(f"Mixture weights must be non-negative with a positive sum, found {list(weights)}.")
    edges = np.cumsum(weights) / sum(weights)
    start = np.diff(np.floor(edges * block * BLOCK + 0.5), prepend=0.0).astype(np.int64)  # given out before this block
    end = np.diff(np.floor(edges * (block + 1) * BLOCK + 0.5), prepend=0.0).astype(np.int64)
    share = end - start
    sources = np.repeat(np.arange(len(weights)), share)
    sources = sources[np.random.default_rng(derive(seed, "mixture", block)).permutation(BLOCK)]
    before = np.empty(BLOCK, dtype=np.int64)
    for source in range(len(weights)):
        here = sources == source
        before[here] = start[source] + np.arange(here.sum())
    return sources, before
