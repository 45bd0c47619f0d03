"""Whatever sequences begin, grow, share, part, lose pages and end: each finds what it wrote, and no page is lost."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hanlin.engine.page_pool import PagePool
from hanlin.engine.tables import NULL, Group, Table, Tables, chain, groups_of, root_of
from hanlin.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig

PAGE = 2
ROOTS = (b"one", b"two")


def make(*windows: int | None, pages: int = 20, page: int = PAGE) -> Tables:
    groups = [Group((i,), window) for i, window in enumerate(windows)]
    return Tables(groups, [PagePool(pages + 1, first=1) for _ in groups], page)


def read(tables: Tables, ids: list[int], *, root: bytes = b"one") -> Table:
    """A sequence that was computed token by token."""
    table = tables.start(root)
    for computed in range(len(ids)):
        assert tables.grow(table, computed, computed + 1)
        tables.publish(table, ids, computed + 1)
    return table


def taken_over(tables: Tables, ids: list[int], *, root: bytes = b"one") -> tuple[Table, int]:
    table = tables.start(root)
    found = tables.find(table, ids, len(ids) - 1)
    assert tables.take_over(table, found) == []
    return table, found.tokens


def test_layers_that_look_equally_far_back_share_a_table():
    layers = [LayerConfig(AttentionConfig(2, 2, 4, window=w), FeedForwardConfig(8)) for w in (None, 5, None, 3, 5)]
    config = ModelConfig("llama", 11, 8, tuple(layers))
    assert groups_of(config) == (Group((0, 2), None), Group((1, 4), 5), Group((3,), 3))
    assert groups_of(config, extra=2)[1] == Group((1, 4, 5, 6), 5)


def test_a_beginning_is_shared_up_to_its_last_whole_page():
    tables = make(None)
    first = read(tables, [1, 2, 3, 4, 5])
    second, known = taken_over(tables, [1, 2, 3, 4, 5])
    assert (known, second.pages) == (4, [first.pages[0][:2]])
    third, known = taken_over(tables, [1, 2, 3, 9, 5])
    assert (known, third.pages) == (2, [first.pages[0][:1]])
    tables.check([first, second, third])


def test_nothing_is_shared_across_models_adapters_and_salts():
    roots = [root_of(*parts) for parts in [("m", "a", "s"), ("n", "a", "s"), ("m", "b", "s"), ("m", "a", "t"),
                                           ("ma", "", "s"), ("m", "as", ""), ("", "ma", "s")]]  # fmt: skip
    assert len(set(roots)) == len(roots)
    tables = make(None)
    read(tables, [1, 2, 3, 4], root=roots[0])
    assert [taken_over(tables, [1, 2, 3, 4, 5], root=root)[1] for root in roots] == [4, 0, 0, 0, 0, 0, 0]


def test_the_hash_of_a_page_says_all_that_stands_before_it():
    assert chain(b"x", [1, 23]) != chain(b"x", [12, 3])
    assert chain(chain(b"x", [1, 2]), [5, 6]) != chain(chain(b"x", [1, 3]), [5, 6])
    assert (
        chain(b"x", [1, 2]).hex() == "26d826f7a8ac5dd78604ba20f2c97c45"
    )  # the same in every process: pages outlive it


def test_a_window_holds_no_more_pages_than_it_sees():
    tables = make(None, 5)
    table = read(tables, list(range(20)))
    assert sum(page != NULL for page in table.pages[0]) == 10
    assert [page != NULL for page in table.pages[1]] == [False] * 8 + [True] * 2  # token 20 sees 16 … 20
    tables.check([table])


def test_a_shared_page_is_copied_before_it_is_written():
    tables = make(None)
    table = read(tables, [1, 2, 3])
    fork = tables.fork(table, 3, 3)
    assert fork is not None
    assert fork.pages == table.pages
    assert tables.grow(fork, 3, 4)
    assert tables.copies == [(0, table.pages[0][1], fork.pages[0][1])]
    assert fork.pages[0][0] == table.pages[0][0]
    tables.check([table, fork])


def test_too_few_pages_change_nothing():
    tables = make(None, 3, pages=4)
    table = read(tables, [1, 2, 3])
    before = [list(held) for held in table.pages]
    assert not tables.grow(table, 3, 30)
    assert table.pages == before and tables.copies == []
    tables.check([table])


def test_a_fork_needs_the_pages_that_its_next_query_sees():
    tables = make(3)
    table = read(tables, list(range(12)))
    assert tables.fork(table, 12, 12) is not None
    assert tables.fork(table, 6, 6) is None  # those were let go


def test_all_windows_must_reach_the_place_where_a_prompt_goes_on():
    """Each alone could go on further: one behind four pages, the other behind two and three."""
    tables = make(5, 3)
    ids = list(range(20))
    read(tables, ids)
    hashes = tables.start(b"one")
    tables.extend_hashes(hashes, ids, 4)
    known = {0: {2, 3}, 1: {1, 2}}  # (of five tokens back: three pages at the fourth; of three: two)
    for group, pool in enumerate(tables.pools):
        for index, key in enumerate(hashes.hashes):
            if index not in known[group]:
                page = pool.find(key + bytes([group]))
                pool.hold(page)
                pool.drop(page, forget=True)
    found = tables.find(tables.start(b"one"), ids, 8)
    assert found.tokens == brute(tables, hashes.hashes) == 0


def brute(tables: Tables, hashes: list[bytes]) -> int:
    """The most tokens, in whole pages, such that all that the next query sees is known in every group."""
    for n in range(len(hashes), 0, -1):
        end = n * tables.page
        whole = True
        for group, (pool, spec) in enumerate(zip(tables.pools, tables.groups, strict=True)):
            for index, key in enumerate(hashes[:n]):
                last = (index + 1) * tables.page - 1
                seen = spec.window is None or end - last < spec.window
                key += bytes([group])
                whole &= not seen or pool.find(key) is not None or tables.lower(key)
        if whole:
            return end
    return 0


class Life(RuleBasedStateMachine):
    """Sequences over pages that remember what was written into them: (root, all tokens up to this one) a token."""

    @initialize(
        windows=st.sampled_from([(None,), (3,), (None, 4), (None, 5, 2), (6, 3)]),
        pages=st.sampled_from([5, 8, 30]),
        lower=st.booleans(),
    )
    def open(self, windows, pages, lower):
        self.tables = make(*windows, pages=pages)
        self.pages = [{page: [None] * PAGE for page in range(pages + 1)} for _ in windows]
        self.below: dict[bytes, list] = {}
        self.live: list[tuple[Table, list[int], bytes, int]] = []  # (table, ids, root, computed)
        if lower:
            self.tables.lower = self.below.__contains__
            for group, pool in enumerate(self.tables.pools):
                pool.on_evict = lambda page, key, group=group: self.demote(group, page, key)

    def demote(self, group, page, key):
        self.copy()
        self.below[key] = list(self.pages[group][page])

    def copy(self):
        for group, source, target in self.tables.copies:
            self.pages[group][target] = list(self.pages[group][source])
        self.tables.copies.clear()

    @rule(
        ids=st.lists(st.integers(0, 1), min_size=1, max_size=14), root=st.sampled_from(ROOTS),
        lost=st.lists(st.booleans(), min_size=30, max_size=30),
    )  # fmt: skip
    def begin(self, ids, root, lost):
        table = self.tables.start(root)
        found = self.tables.find(table, ids, len(ids) - 1)
        assert found.tokens == brute(self.tables, table.hashes[: (len(ids) - 1) // PAGE])
        loads = self.tables.take_over(table, found)
        if loads is None:
            assert all(held == [] for held in table.pages)
            return
        self.copy()
        gone = []
        for (group, page, key), bad in zip(loads, lost, strict=False):
            self.pages[group][page] = [None] * PAGE if bad else list(self.below[key])
            if bad:
                gone.append((group, table.pages[group].index(page)))
        computed = found.tokens
        if gone:
            computed = self.tables.cut(table, computed, gone)
        self.live.append((table, ids, root, computed))

    @precondition(lambda self: getattr(self, "live", []))
    @rule(which=st.integers(0, 9), count=st.integers(1, 5), new=st.lists(st.integers(0, 1), min_size=5, max_size=5),
          guessed=st.integers(0, 2))  # fmt: skip
    def advance(self, which, count, new, guessed):
        """Compute tokens, and some behind them that turn out to be wrong."""
        at = which % len(self.live)
        table, ids, root, computed = self.live[at]
        ids = [*ids, *new][: max(len(ids), computed + count)]
        end = computed + count
        if not self.tables.grow(table, computed, end + guessed):
            return
        self.copy()
        for group, held in enumerate(table.pages):
            for position in range(computed, end + guessed):
                text = (root, tuple(ids[: position + 1])) if position < end else "wrong"
                self.pages[group][held[position // PAGE]][position % PAGE] = text
        self.tables.publish(table, ids, end)
        self.live[at] = (table, ids, root, end)

    @precondition(lambda self: getattr(self, "live", []))
    @rule(which=st.integers(0, 9), back=st.integers(0, 6))
    def fork(self, which, back):
        table, ids, root, computed = self.live[which % len(self.live)]
        tokens = max(0, computed - back)
        copy = self.tables.fork(table, tokens, tokens)
        if copy is not None:
            self.live.append((copy, ids[: tokens + 1], root, tokens))
        elif all(group.window is None for group in self.tables.groups):
            raise AssertionError("a fork was refused though nothing was let go")

    @precondition(lambda self: getattr(self, "live", []))
    @rule(which=st.integers(0, 9), forget=st.booleans())
    def end(self, which, forget):
        self.tables.free(self.live.pop(which % len(self.live))[0], forget=forget)

    @invariant()
    def everybody_reads_what_was_written(self):
        if not hasattr(self, "tables"):
            return
        self.tables.check([table for table, *_ in self.live])
        for table, ids, root, computed in self.live:
            for group, held in zip(self.tables.groups, table.pages, strict=True):
                first = 0 if group.window is None else max(0, computed + 1 - group.window)
                store = self.pages[group.layers[0]]
                for position in range(first, computed):
                    text = store[held[position // PAGE]][position % PAGE]
                    assert text == (root, tuple(ids[: position + 1])), (group, position)

    def teardown(self):
        if hasattr(self, "tables"):
            for table, *_ in self.live:
                self.tables.free(table)
            assert all(pool.free == pool.size for pool in self.tables.pools)


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 2, 3, 7])
def test_a_lost_page_leaves_what_stands_before_it(window):
    tables = make(None, window)
    ids = list(range(12))
    table = read(tables, ids)
    left = tables.cut(table, 12, [(0, 4)])
    assert left == (8 if window is None else 0)  # what a window let go of cannot be had back
    tables.check([table])
