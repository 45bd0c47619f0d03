"""A page is free or held, known contents are found until their page is needed, and the longest unused goes first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hanlin.engine.page_pool import PagePool

PAGES = 6
KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f", b"g"])


def filled(pages: int, *, told: list | None = None) -> PagePool:
    """Pages 0 … pages - 1 with known contents b"0", b"1", …, let go in this order."""
    pool = PagePool(pages, on_evict=None if told is None else lambda page, key: told.append((page, key)))
    taken = [pool.take() for _ in range(pages)]
    for page in taken:
        pool.publish(page, b"%d" % page)
    for page in taken:
        pool.drop(page)
    return pool


def test_a_page_keeps_its_contents_until_it_is_needed():
    pool = filled(3)
    assert (pool.free, pool.known) == (3, 3)
    pool.hold(1)
    assert (pool.find(b"1"), pool.free) == (1, 2)
    assert [pool.take(), pool.take()] == [0, 2]
    assert [pool.find(key) for key in (b"0", b"1", b"2")] == [None, 1, None]
    with pytest.raises(IndexError, match="free"):
        pool.take()


def test_the_longest_unused_is_given_up_first_and_named_before():
    told = []
    pool = filled(4, told=told)
    pool.hold(0)
    pool.drop(0)  # used again: now the last in line
    assert [pool.take() for _ in range(4)] == [1, 2, 3, 0]
    assert told == [(1, b"1"), (2, b"2"), (3, b"3"), (0, b"0")]


def test_pages_without_contents_go_before_those_with():
    told = []
    pool = filled(3, told=told)
    page = pool.take()
    pool.drop(page)
    assert pool.take() == page
    assert told == [(0, b"0")]


def test_the_first_page_of_a_key_stays_the_one_that_is_found():
    pool = PagePool(3, first=1)
    a, b = pool.take(), pool.take()
    pool.publish(a, b"same")
    pool.publish(b, b"same")
    assert (pool.find(b"same"), pool.key_of(b)) == (a, None)
    pool.drop(a, forget=True)
    assert pool.find(b"same") is None
    pool.publish(b, b"same")
    assert pool.find(b"same") == b


def test_what_nobody_holds_cannot_be_dropped():
    pool = filled(2)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.drop(0)


def test_contents_are_listed_the_longest_unused_first():
    pool = filled(4)
    pool.hold(2)
    assert pool.contents() == [(0, b"0"), (1, b"1"), (3, b"3"), (2, b"2")]


class Twin(RuleBasedStateMachine):
    """The same with plain lists: `line` of free pages in order, `holders`, `names`."""

    def __init__(self):
        super().__init__()
        self.told, self.expected = [], []
        self.pool = PagePool(PAGES, first=1, on_evict=lambda page, key: self.told.append((page, key)))
        self.line = list(range(1, PAGES))
        self.holders = dict.fromkeys(self.line, 0)
        self.names: dict[int, bytes] = {}

    def held(self) -> list[int]:
        return [page for page, count in self.holders.items() if count]

    @precondition(lambda self: self.line)
    @rule()
    def take(self):
        page = self.line.pop(0)
        if page in self.names:
            self.expected.append((page, self.names.pop(page)))
        self.holders[page] = 1
        assert self.pool.take() == page

    @rule(page=st.integers(1, PAGES - 1))
    def hold(self, page):
        if self.holders[page] or page in self.names:
            if not self.holders[page]:
                self.line.remove(page)
            self.holders[page] += 1
            self.pool.hold(page)

    @precondition(lambda self: self.held())
    @rule(which=st.integers(0, PAGES), forget=st.booleans())
    def drop(self, which, forget):
        page = self.held()[which % len(self.held())]
        if forget:
            self.names.pop(page, None)
        self.holders[page] -= 1
        if not self.holders[page]:
            self.line.insert(len(self.line) if page in self.names else 0, page)
        self.pool.drop(page, forget=forget)

    @precondition(lambda self: self.held())
    @rule(which=st.integers(0, PAGES), key=KEYS)
    def publish(self, which, key):
        page = self.held()[which % len(self.held())]
        if page not in self.names and key not in self.names.values():
            self.names[page] = key
        self.pool.publish(page, key)

    @invariant()
    def both_say_the_same(self):
        self.pool.check({page: count for page, count in self.holders.items() if count})
        assert self.pool.free == len(self.line)
        assert self.pool.known == len(self.names)
        assert [self.pool.key_of(page) for page in range(1, PAGES)] == [self.names.get(p) for p in range(1, PAGES)]
        for page, key in self.names.items():
            assert self.pool.find(key) == page
        assert self.told == self.expected


TestTwin = Twin.TestCase
TestTwin.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
