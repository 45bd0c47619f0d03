"""Who computes what in the next step.

There are no phases. A request has tokens and how many of them are computed; a step computes some of what is missing:
one token of a sequence that runs, a piece of a prompt that is being read, the end of a prompt whose beginning another
sequence had. Running requests keep the first slots of the cache: request i of `running` is slot i, and those that miss
one token stand before those that miss more, so that decoding reads the cache as one view.

Behind them lie the slots of the sequences that ended last. A new prompt that begins like one of them, or like one that
runs, takes over what is already computed (the next turn of a chat; a shared system prompt; n completions of a prompt).
"""

from collections import deque
from dataclasses import dataclass

from hanlin.engine.cache import ContiguousCache
from hanlin.engine.request import Request

WORTH_COPYING = 16  # tokens of a common beginning


@dataclass(frozen=True)
class Work:
    """One forward pass: the next `count` missing tokens of each request; slots: theirs, one after the other.

    sample: these tokens are all that was missing, so a next token can be chosen.
    """

    requests: list[Request]
    slots: range
    count: int
    sample: bool


class Scheduler:
    """First come, first served. cache: has `max_batch` slots for running sequences, the others keep ended ones."""

    def __init__(self, cache: ContiguousCache, *, max_batch: int, max_prefill_tokens: int) -> None:
        self.cache, self.max_batch, self.max_prefill_tokens = cache, max_batch, max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._kept: dict[int, list[int]] = {}  # slot -> the tokens it holds, least recently used first
        self._spare = list(range(max_batch, cache.slots))

    def admit(self) -> list[Request]:
        """Move waiting requests to free slots; returns them."""
        admitted, early = [], []
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting.popleft()
            if self._is_early(request):
                early.append(request)
                continue
            source, length = self._longest_beginning(request)
            slot = len(self.running)
            if length:
                self.cache.move(source, slot, length)
                request.computed = request.cached_tokens = length
            self.running.append(request)
            admitted.append(request)
        self.waiting.extendleft(reversed(early))
        return admitted

    def plan(self) -> list[Work]:
        """The forward passes of the next step: all that miss one token together; prompts under the token budget,
        neighbours with equally much to read together."""
        budget, plan = self.max_prefill_tokens, []
        for slot, request in enumerate(self.running):
            count = 1 if request.missing == 1 else min(request.missing, budget)
            budget -= count if request.missing > 1 else 0
            if not count:
                continue
            sample = count == request.missing
            last = plan[-1] if plan else None
            if last and (last.count, last.sample, last.slots.stop) == (count, sample, slot):
                plan[-1] = Work([*last.requests, request], range(last.slots.start, slot + 1), count, sample)
            else:
                plan.append(Work([request], range(slot, slot + 1), count, sample))
        return plan

    def retire(self, request: Request, *, keep: bool = True) -> None:
        """Take a request out of the batch and close the gap; keep: remember what its slot holds (else it may hold
        anything, after an error)."""
        hole = self.running.index(request)
        if not keep:
            self.cache.wipe(hole)
        if keep and (held := self.cache.held[hole]) >= WORTH_COPYING and (spare := self._spare_slot()) is not None:
            self.cache.move(hole, spare)
            self._kept[spare] = request.ids[:held]
        last = len(self.running) - 1
        reading = next((i for i, r in enumerate(self.running) if i > hole and r.missing > 1), last + 1)
        for mover in (reading - 1, last):  # the last that decodes into the gap, the last of all into the gap it leaves
            if mover > hole:
                self.cache.move(mover, hole)
                self.running[hole] = self.running[mover]
                hole = mover
        self.cache.truncate(last, 0)
        self.running.pop()

    def forget(self) -> None:
        """Drop what ended sequences left."""
        for slot in self._kept:
            self.cache.truncate(slot, 0)
        self._spare += self._kept
        self._kept.clear()

    def _is_early(self, request: Request) -> bool:
        """Its prompt is being read by another completion of the same: soon there is something to take over."""
        leader = request.leader
        worth = request.prompt_tokens > WORTH_COPYING
        return worth and leader is not None and leader.missing > 1 and leader in self.running

    def _spare_slot(self) -> int | None:
        if self._spare:
            return self._spare.pop()
        if not self._kept:
            return None
        oldest = next(iter(self._kept))
        del self._kept[oldest]
        return oldest

    def _longest_beginning(self, request: Request) -> tuple[int, int]:
        """(slot, how many of its tokens the request can take over): 0 where that is not worth a copy."""
        computed = [(slot, r.ids[: r.computed]) for slot, r in enumerate(self.running)]
        wanted = request.ids[:-1]  # the last is computed anyway: its logits are needed
        found = [(common_beginning(ids, wanted), slot) for slot, ids in (*computed, *self._kept.items())]
        length, source = max(found, default=(0, 0))
        if length < WORTH_COPYING:
            return 0, 0
        if source in self._kept:
            self._kept[source] = self._kept.pop(source)  # used last
        return source, length


def common_beginning(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences share from the start (bisection over slices, which compare at C's speed)."""
    low, high = 0, min(len(a), len(b))
    if not high or a[0] != b[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
