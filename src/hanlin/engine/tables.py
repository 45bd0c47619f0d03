"""Page tables: which pages hold the keys and values of a sequence, shared between sequences that begin alike.

    tokens     0 … 15   16 … 31   32 … 40          a page is `page` tokens of all layers of a group
    table      [ 7 ,      3 ,       9 ]            pages 7 and 3 are full, and known by their hash to everybody
    hashes     h(root, t0…15)   h(h0, t16…31)      a chain: a page's hash says all that stands before it

Layers that look equally far back are a group: those of full attention keep every page, those of a window drop the pages
behind it (page 0, the null page, stands in their place). Each group has its own pool.

The root of a chain is of the model, the adapter and the salt, so nothing is shared across them. A page that more than
one table holds is never written: `grow` copies it first (copy on write), which is how beams and n completions part.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hanlin.engine.page_pool import PagePool
from hanlin.models.config import ModelConfig
from hanlin.nn.masks import reach

NULL = 0


@dataclass(frozen=True)
class Group:
    """Layers that share a page table: their indices, and how far back they see (None: everything)."""

    layers: tuple[int, ...]
    window: int | None


def groups_of(config: ModelConfig, *, extra: int = 0) -> tuple[Group, ...]:
    """The layers of a model by how far they look back, the farthest first. extra: layers behind the last (multi-token
    prediction), which are like it."""
    found: dict[int | None, list[int]] = {}
    layers = (*config.layers, *[config.layers[-1]] * extra)
    for index, layer in enumerate(layers):
        found.setdefault(reach(layer.attention.mask), []).append(index)
    far = sorted(found, key=lambda window: -(window or 1 << 60))
    return tuple(Group(tuple(found[window]), window) for window in far)


@dataclass(eq=False)
class Table:
    """The pages of one sequence, a list a group; pages of the host's tier are negative. root: of its hash chain;
    hashes: of its full pages, as far as they were made; published: how many of them others can find."""

    pages: list[list[int]]
    root: bytes
    hashes: list[bytes] = field(default_factory=list)
    published: int = 0


@dataclass(frozen=True)
class Found:
    """The longest known beginning: tokens, and for each group what stands for its pages: a device page, or the key of
    one that lies in a lower tier, or None for what no layer will look at."""

    tokens: int
    places: list[list[int | bytes | None]]


class Tables:
    """Grows, shares, forks and frees tables. The next step begins with `wipes`, (group, page) that may hold what is no
    number, and `copies`, (group, from, to)."""

    def __init__(self, groups: Sequence[Group], pools: Sequence[PagePool], page: int) -> None:
        self.groups, self.pools, self.page = tuple(groups), tuple(pools), page
        self.copies: list[tuple[int, int, int]] = []
        self.wipes: list[tuple[int, int]] = []
        self.lower: Callable[[bytes], bool] = lambda key: False  # whether a lower tier has these contents
        self.host: Sequence[PagePool] = ()  # where a table's negative pages lie

    def start(self, root: bytes, hashes: list[bytes] | None = None) -> Table:
        """An empty table; hashes: of the tokens' full pages, as far as they were made before."""
        return Table([[] for _ in self.groups], root, [] if hashes is None else hashes)

    def fits(self, tokens: int, *, sequences: int = 1, step: int = 0) -> bool:
        """Whether the pools could ever hold so many tokens; step: tokens computed at once, which windows must hold
        too."""
        for group, pool in enumerate(self.pools):
            behind = self.groups[group].window
            most = tokens if behind is None else min(tokens, behind + step)
            if sequences * (-(-most // self.page) + (behind is not None)) > pool.size:
                return False
        return True

    def missing(self, table: Table, tokens: int) -> list[int]:
        """Pages a group that `table` lacks to hold so many tokens."""
        pages = -(-tokens // self.page)
        return [max(0, pages - len(held)) for held in table.pages]

    def grow(self, table: Table, computed: int, tokens: int) -> bool:
        """Make room for the tokens from `computed` up to `tokens`, in pages that no other table holds; False, and
        nothing done, where too few are free."""
        first = computed // self.page
        shared = [[i for i in range(first, len(p)) if p[i] > 0 and pool.holders(p[i]) > 1]
                  for p, pool in zip(table.pages, self.pools, strict=True)]  # fmt: skip
        wanted = self.missing(table, tokens)
        if any(n + len(s) > pool.free for n, s, pool in zip(wanted, shared, self.pools, strict=True)):
            return False
        for group, pool in enumerate(self.pools):
            held = table.pages[group]
            for index in shared[group]:
                page = pool.take()
                self.copies.append((group, held[index], page))
                pool.drop(held[index])
                held[index] = page
            held.extend(pool.take() for _ in range(wanted[group]))
        return True

    def publish(self, table: Table, ids: Sequence[int], computed: int) -> None:
        """So many tokens are computed: full pages get their hashes and can be found by others; pages that no later
        query sees go back."""
        full = computed // self.page
        self.extend_hashes(table, ids, full)
        for group, pool in enumerate(self.pools):
            held, mark = table.pages[group], bytes([group])
            for index in range(table.published, full):
                if held[index] > 0:
                    pool.publish(held[index], table.hashes[index] + mark)
            window = self.groups[group].window
            if window is not None:
                self._let_go_behind(held, pool, (computed + 1 - window) // self.page)
        table.published = max(table.published, full)

    def extend_hashes(self, table: Table, ids: Sequence[int], full: int) -> None:
        while len(table.hashes) < full:
            begin = len(table.hashes) * self.page
            before = table.hashes[-1] if table.hashes else table.root
            table.hashes.append(chain(before, ids[begin : begin + self.page]))

    def find(self, table: Table, ids: Sequence[int], limit: int) -> Found:
        """The longest beginning of ids[:limit] whose pages are known, here or in a lower tier."""
        self.extend_hashes(table, ids, limit // self.page)
        hashes = table.hashes[: limit // self.page]
        rows: list[list[int | bytes | None]] = []
        longest = len(hashes)
        for group, pool in enumerate(self.pools):
            row: list[int | bytes | None] = []
            for chained in hashes:
                key = chained + bytes([group])
                page = pool.find(key)
                row.append(page if page is not None else key if self.lower(key) else None)
            rows.append(row)
            if self.groups[group].window is None:
                longest = min(longest, next((i for i, place in enumerate(row) if place is None), len(row)))
        places = set(range(longest + 1))  # a window needs only the pages in front of the place where it goes on
        for group, row in zip(self.groups, rows, strict=True):
            if group.window is not None:
                places &= self._reachable(row, longest, group.window)
        longest = max(places)
        for group, row in enumerate(rows):
            window = self.groups[group].window
            del row[longest:]
            if window is not None:
                hidden = max(0, (longest * self.page + 1 - window) // self.page)
                row[:hidden] = [None] * hidden
        return Found(longest * self.page, rows)

    def take_over(self, table: Table, found: Found) -> list[tuple[int, int, bytes]] | None:
        """Hold what was found; pages for what lies in a lower tier are taken: returns (group, page, key) of each, to be
        loaded; None, and nothing held, where too few pages are free."""
        for row, pool in zip(found.places, self.pools, strict=True):
            idle = sum(isinstance(p, int) and not pool.holders(p) for p in row)
            if sum(isinstance(p, bytes) for p in row) + idle > pool.free:
                return None
        for row, pool in zip(found.places, self.pools, strict=True):
            for place in row:
                if isinstance(place, int):
                    pool.hold(place)
        loads = []
        for group, (row, pool) in enumerate(zip(found.places, self.pools, strict=True)):
            for place in row:
                page = NULL if place is None else place if isinstance(place, int) else pool.take()
                if isinstance(place, bytes):
                    loads.append((group, page, place))
                table.pages[group].append(page)
        table.published = 0 if loads else found.tokens // self.page
        return loads

    def fork(self, table: Table, tokens: int, window_from: int) -> Table | None:
        """A second table over the first `tokens` tokens; None where pages that a query at `window_from` sees have been
        let go."""
        pages = -(-tokens // self.page)
        for group, held in zip(self.groups, table.pages, strict=True):
            seen = 0 if group.window is None else max(0, (window_from + 1 - group.window) // self.page)
            if len(held) < pages or any(page <= 0 for page in held[seen:pages]):
                return None
        copy = Table([held[:pages] for held in table.pages], table.root, table.hashes[: tokens // self.page])
        copy.published = min(table.published, tokens // self.page)
        for held, pool in zip(copy.pages, self.pools, strict=True):
            for page in held:
                if page > 0:
                    pool.hold(page)
        return copy

    def free(self, table: Table, *, forget: bool = False) -> None:
        """Let all pages go, the last ones first, so that beginnings are found longest."""
        for group in range(len(self.pools)):
            self._drop_from(table, group, 0, forget=forget)
        table.published = 0

    def cut(self, table: Table, computed: int, lost: Sequence[tuple[int, int]]) -> int:
        """Pages (group, index) could not be brought back: let go of them and of all behind; returns the tokens that
        are still known."""
        first = min(index for _, index in lost)
        if any(self.groups[group].window is not None for group, _ in lost):
            first = 0  # what a window needs has a hole
        for group in range(len(self.pools)):
            self._drop_from(table, group, first)
            if any(page == NULL for page in table.pages[group]):  # a window that began further on
                return self.cut(table, computed, [(group, 0)]) if first else 0
        return min(computed, first * self.page)

    def alone(self, table: Table) -> list[tuple[int, int]]:
        """(group, page) of the device's pages that no other table holds."""
        return [
            (group, page)
            for group, (held, pool) in enumerate(zip(table.pages, self.pools, strict=True))
            for page in held
            if page > 0 and pool.holders(page) == 1
        ]

    def check(self, tables: Sequence[Table]) -> None:
        """Every page is free or in exactly as many tables as it has holders."""
        for group, pool in enumerate(self.pools):
            pool.check(Counter(page for table in tables for page in table.pages[group] if page > 0))
        for group, pool in enumerate(self.host):
            pool.check(Counter(-page for table in tables for page in table.pages[group] if page < 0))

    @property
    def usage(self) -> float:
        """The part of all pages that sequences hold."""
        total = sum(pool.size for pool in self.pools)
        return 1 - sum(pool.free for pool in self.pools) / max(1, total)

    def _reachable(self, row: Sequence[object], longest: int, window: int) -> set[int]:
        """All n ≤ longest such that the pages that a query behind n pages sees are all there."""
        found, run = {0}, 0
        for n in range(1, longest + 1):
            run = 0 if row[n - 1] is None else run + 1
            first = max(0, (n * self.page + 1 - window) // self.page)
            if run >= n - first:
                found.add(n)
        return found

    def _drop_from(self, table: Table, group: int, first: int, *, forget: bool = False) -> None:
        held = table.pages[group]
        for page in reversed(held[first:]):
            if page > 0:
                self.pools[group].drop(page, forget=forget)
            elif page < 0:
                self.host[group].drop(-page, forget=True)
        del held[first:]

    @staticmethod
    def _let_go_behind(held: list[int], pool: PagePool, end: int) -> None:
        for index in range(min(end, len(held)) - 1, -1, -1):
            if held[index] == NULL:
                break
            if held[index] > 0:
                pool.drop(held[index])
            held[index] = NULL


def chain(before: bytes, ids: Sequence[int]) -> bytes:
    """The hash of a page: of all before it, and of its tokens. Stable between processes."""
    text = ",".join(map(str, ids)).encode()
    return hashlib.blake2b(text, digest_size=16, key=before).digest()


def root_of(identity: str, adapter: str, salt: str) -> bytes:
    """Where a chain begins: nothing is shared between models, adapters and salts."""
    parts = [part.encode() for part in (identity, adapter, salt)]
    return hashlib.blake2b(b"\0".join(b"%d:%s" % (len(p), p) for p in parts), digest_size=16).digest()
