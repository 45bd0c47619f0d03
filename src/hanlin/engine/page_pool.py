"""Which pages are free, which are held and how often, and what each is known to contain. Numbers only, no tensors.

A page that nobody holds is free but keeps its contents until it is needed: it is found again by the hash of what it
contains. Free pages stand in one line, the one to be used next in front: pages without known contents first, then the
longest unused (LRU). Taking, finding, holding and letting go are all O(1).

The same class counts the pages of every tier: the device's, the host's.
"""

from collections import OrderedDict
from collections.abc import Callable

OnEvict = Callable[[int, bytes], None]


class PagePool:
    """Pages `first` … `pages` - 1. on_evict: is told (page, key) just before known contents are given up."""

    def __init__(self, pages: int, *, first: int = 0, on_evict: OnEvict | None = None) -> None:
        self.pages, self.first, self.on_evict = pages, first, on_evict
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(first, pages))
        self._holders = [0] * pages
        self.highest = first  # the highest page that was ever taken
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds, with or without known contents."""
        return len(self._free)

    @property
    def size(self) -> int:
        return self.pages - self.first

    @property
    def known(self) -> int:
        """Pages that can be found by their contents."""
        return len(self._page_of)

    def take(self) -> int:
        """A page for new contents, held once. IndexError: none is free."""
        if not self._free:
            raise IndexError("no page is free")
        page, _ = self._free.popitem(last=False)
        self._forget(page, tell=True)
        self._holders[page] = 1
        self.highest = max(self.highest, page)
        return page

    def hold(self, page: int) -> None:
        """One more holder."""
        if not self._holders[page]:
            del self._free[page]
        self._holders[page] += 1

    def drop(self, page: int, *, forget: bool = False) -> None:
        """One holder less; forget: its contents are worth nothing."""
        if self._holders[page] < 1:
            raise ValueError(f"page {page} is dropped, but nobody holds it")
        self._holders[page] -= 1
        if forget:
            self._forget(page, tell=False)
        if not self._holders[page]:
            self._free[page] = None
            if page not in self._key_of:
                self._free.move_to_end(page, last=False)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def publish(self, page: int, key: bytes) -> None:
        """The contents of a held page are complete: `key` finds them. The first page of a key stays the one found."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, key: bytes) -> int | None:
        return self._page_of.get(key)

    def key_of(self, page: int) -> bytes | None:
        return self._key_of.get(page)

    def contents(self) -> list[tuple[int, bytes]]:
        """(page, key) of all known contents, the longest unused free ones first."""
        return [(p, self._key_of[p]) for p in dict.fromkeys((*self._free, *self._key_of)) if p in self._key_of]

    def check(self, held: dict[int, int] | None = None) -> None:
        """Every page is free or held, never both; keys and pages name each other. held: page -> how many tables hold
        it. AssertionError where that is not so."""
        for page in range(self.first, self.pages):
            assert (page in self._free) == (self._holders[page] == 0), f"page {page}: free and held"
            if held is not None:
                found = held.get(page, 0)
                assert found == self._holders[page], f"page {page}: {self._holders[page]} holders, {found} tables"
        assert len(self._page_of) == len(self._key_of), "keys and pages differ in number"
        for key, page in self._page_of.items():
            assert self._key_of[page] == key, f"page {page}: two keys"

    def _forget(self, page: int, *, tell: bool) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            if tell and self.on_evict is not None:
                self.on_evict(page, key)
            del self._page_of[key]
