"""How much memory an engine gives to keys and values, and how it is shared out.

    device    cache_bytes → pages of every group of layers        host    host_bytes        disk    disk_bytes

A group of full attention gets a page for every `page_size` tokens; one with a window needs no more pages than its
window, times the sequences that run together, and leaves the rest to the others.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hanlin.core.errors import HanlinError
from hanlin.engine.disk_tier import DiskTier
from hanlin.engine.limits import Limits
from hanlin.engine.page_pool import PagePool
from hanlin.engine.paged_cache import PagedCache
from hanlin.engine.tables import Group, Tables, groups_of
from hanlin.engine.tiers import Tiers
from hanlin.models.config import ModelConfig
from hanlin.models.transformer import Transformer

SHARE = 0.25  # of the memory that is free, if nobody says more


@dataclass(frozen=True)
class Memory:
    """capacity: tokens that one sequence can hold at most; identity: of the model, where hash chains begin."""

    cache: PagedCache
    tables: Tables
    tiers: Tiers
    capacity: int
    identity: str


def open_memory(
    model: Transformer, limits: Limits, *, config: ModelConfig | None = None, identity: str | None = None
) -> Memory:
    """config: where it differs from the model's (one rank of several holds fewer heads). identity: of the model, for
    pages on disk; None: its fingerprint."""
    config = config or model.config
    page, dtype, extra = limits.page_size, model.dtype, config.predict_ahead or 0
    groups = groups_of(config, extra=extra)
    shape = PagedCache(config, pages=[0] * len(groups), dtype=dtype, page=page, extra_layers=extra)
    sizes = [shape.page_bytes(group) for group in range(len(groups))]
    context = min(limits.max_context or config.max_positions, config.max_positions)
    wanted = [_pages(group, context, page, limits.max_batch, limits.step_tokens) for group in groups]
    budget = limits.cache_bytes or int(SHARE * free_memory(model.device))
    pages = share_out(groups, sizes, wanted, budget, exact=limits.cache_bytes is not None)
    if min(pages) < 2:
        raise HanlinError(
            f"cache_bytes is {budget:,}; that is less than two pages of {page} tokens ({sum(sizes):,} bytes a page of "
            "all layers). Raise it."
        )
    host = [0] * len(groups)
    if limits.host_bytes:
        host = share_out(groups, sizes, [1 << 40] * len(groups), limits.host_bytes, exact=True)
    cache = PagedCache(
        config, pages=[n + 1 for n in pages], dtype=dtype, page=page, device=model.device, extra_layers=extra,
        host_pages=[n + 1 for n in host] if limits.host_bytes else (),
    )  # fmt: skip
    tables = Tables(groups, [PagePool(n + 1, first=1) for n in pages], page)
    disk = None
    if limits.disk_folder is not None:
        identity = identity or fingerprint(model)
        layout = f"{identity} {dtype} {page} {[group.layers for group in groups]}"
        disk = DiskTier(
            Path(limits.disk_folder),
            limit_bytes=limits.disk_bytes,
            page_bytes=dict(enumerate(sizes)),
            identity=layout.encode(),
        )
    full = [g for g, group in enumerate(groups) if group.window is None]
    capacity = min([(pages[g] + host[g]) * page for g in full], default=config.max_positions)
    return Memory(cache, tables, Tiers(tables, cache, disk), capacity, identity or "")


def share_out(
    groups: Sequence[Group], sizes: Sequence[int], wanted: Sequence[int], budget: int, *, exact: bool
) -> list[int]:
    """Pages of each group: as many tokens for all as the budget allows, at most `wanted` (exact: whatever is wanted,
    all of the budget goes to those that keep everything)."""
    pages = [0] * len(groups)
    left, open_groups = budget, set(range(len(groups)))
    while open_groups:
        each = left // sum(sizes[g] for g in open_groups)
        capped = {g for g in open_groups if wanted[g] <= each and not (exact and groups[g].window is None)}
        for group in capped or open_groups:
            pages[group] = min(wanted[group], each) if capped else each
            left -= pages[group] * sizes[group]
        open_groups -= capped or open_groups
    return pages


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 << 30  # unknown: what a small laptop has


@torch.no_grad()
def fingerprint(model: Transformer) -> str:
    """Tells models apart by a sample of every weight: pages on disk are found by the model that wrote them only."""
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise HanlinError(
            "The weights of a frozen model cannot be told apart any more; give the engine its `identity`."
        )
    found = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.flatten()
        found.update(flat[:: max(1, len(flat) // 256)].double().cpu().numpy().tobytes())
    return found.hexdigest()


def _pages(group: Group, context: int, page: int, sequences: int, step: int) -> int:
    """Pages that so many sequences can use; of a window twice as many, so that ended ones can be found again."""
    most = context if group.window is None else min(context, group.window + page)
    each = -(-most // page) + 1
    return sequences * each * (1 if group.window is None else 2) + -(-step // page)
