"""Who computes what: one budget a step, turns by priority and by what a client was served, pages shared and given back.

No model runs here: every token is "computed" at once, and the next one is a given number.
"""

import threading
import time
from concurrent.futures import Future

import pytest
import torch

from hanlin.engine import Engine, SamplingParams
from hanlin.engine.page_pool import PagePool
from hanlin.engine.paged_cache import PagedCache
from hanlin.engine.request import Owner, Request
from hanlin.engine.scheduler import Scheduler, Work
from hanlin.engine.tables import Tables, groups_of, root_of
from hanlin.engine.tiers import Tiers
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig

PAGE = 4
CONFIG = ModelConfig.uniform(
    "llama", depth=1, attention=AttentionConfig(1, 1, 2), feed_forward=FeedForwardConfig(4), vocab_size=9, width=2
)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


class Desk:
    """A scheduler with `pages` pages of 4 tokens, and somebody who computes what it plans."""

    def __init__(self, *, pages: int = 100, batch: int = 8, budget: int = 16) -> None:
        cache = PagedCache(CONFIG, pages=[pages + 1], dtype=torch.float32, page=PAGE)
        self.tables = Tables(groups_of(CONFIG), [PagePool(pages + 1, first=1)], PAGE)
        self.scheduler = Scheduler(self.tables, Tiers(self.tables, cache), max_batch=batch, step_tokens=budget)
        self.steps: list[list[Work]] = []
        self.ended: list[Request] = []

    def add(
        self, prompt: int | list[int], new: int = 4, *, leader: Request | None = None, index: int = 0, **owner
    ) -> Request:
        ids = [1] * prompt if isinstance(prompt, int) else prompt
        request = Request(
            ids, SamplingParams(temperature=0, max_tokens=new), spelling=lambda token: b"", end_ids=frozenset(),
            room=10**6, deliver=lambda event: None, owner=Owner(**owner), leader=leader, index=index,
        )  # fmt: skip
        request.root = root_of("", request.owner.adapter or "", request.owner.salt)
        self.scheduler.add(request)
        return request

    def step(self) -> list[Work]:
        works = self.scheduler.plan({})
        self.tables.copies.clear()
        for work in works:
            if work.sample:
                work.request.accept(2, None)
            self.scheduler.computed(work, 0)
        self.scheduler.check()
        for work in works:
            if work.request.finish_reason is not None:
                self.scheduler.retire(work.request)
                self.ended.append(work.request)
        self.steps.append(works)
        return works

    def run(self) -> None:
        while self.scheduler.open:
            assert self.step() and len(self.steps) < 2000


def counts(works: list[Work]) -> list[int]:
    return [work.count for work in works]


def test_a_step_is_one_budget_and_decoding_goes_first():
    desk = Desk(budget=10)
    short = desk.add(3, 30)
    assert counts(desk.step()) == [3]
    long = desk.add(47, 2)
    for _ in range(5):
        works = desk.step()
        assert [work.request for work in works] == [short, long]
        assert counts(works) == [1, 9]
    assert counts(desk.step()) == [1, 2]  # what the prompt still lacked
    assert counts(desk.step()) == [1, 1]


@pytest.mark.parametrize("budget", [4, 7, 32])
def test_no_prompt_delays_a_running_stream_beyond_one_budget(budget):
    desk = Desk(budget=budget, pages=400)
    stream = desk.add(2, 60)
    desk.step()
    for length in (200, 90, 31):
        desk.add(length, 3)
    before = stream.generated
    while stream.finish_reason is None:
        works = desk.step()
        assert sum(counts(works)) <= budget
        assert stream.generated == (before := before + 1)
    desk.run()
    assert len(desk.ended) == 4


def test_prompts_share_what_decoding_leaves_of_the_budget():
    desk = Desk(budget=16)
    a, b, c = desk.add(6), desk.add(6), desk.add(20)
    works = desk.step()
    assert [(work.request, work.count, work.sample) for work in works] == [(a, 6, True), (b, 6, True), (c, 4, False)]
    works = desk.step()
    assert [(work.request, work.count) for work in works] == [(a, 1), (b, 1), (c, 14)]


def test_lower_priority_numbers_are_admitted_first_and_equal_ones_in_order():
    desk = Desk(batch=1)
    order = [desk.add(3, 2, priority=p) for p in (1, 0, 2, 0, 1)]
    desk.run()
    assert desk.ended == [order[i] for i in (1, 3, 0, 4, 2)]


def test_the_client_that_was_served_least_is_next():
    desk = Desk(batch=2, budget=64)
    for _ in range(20):
        desk.add(8, 8, client="greedy")
    desk.step()
    late = [desk.add(8, 8, client="modest") for _ in range(4)]
    while late[-1].finish_reason is None:
        desk.step()
        served = desk.scheduler.served
        if any(r.owner.client == "modest" for r in desk.scheduler.waiting):
            assert abs(served["greedy"] - served["modest"]) <= 2 * 16  # two requests in a batch of two
    assert sum(r.owner.client == "greedy" for r in desk.ended) <= 6  # of 20 that came before


def test_tokens_count_for_fairness_and_not_requests():
    desk = Desk(batch=1, budget=256, pages=200)
    for _ in range(4):
        desk.add(100, 2, client="long")
    for _ in range(20):
        desk.add(2, 2, client="short")
    while desk.scheduler.open and len(desk.ended) < 19:
        desk.step()
    assert sum(r.owner.client == "long" for r in desk.ended) <= 1


def test_who_comes_back_has_not_saved_up_turns():
    desk = Desk(batch=1)
    desk.add(4, 4, client="b")
    desk.run()
    for _ in range(10):
        desk.add(4, 8, client="a")
    for _ in range(40):
        desk.step()
    for _ in range(10):
        desk.add(4, 8, client="b")
    ended = len(desk.ended)
    while len(desk.ended) < ended + 8:
        desk.step()
    last = [r.owner.client for r in desk.ended[ended + 1 :]]
    assert abs(last.count("a") - last.count("b")) <= 2


def test_the_last_in_rank_gives_way_first_and_comes_back():
    desk = Desk(pages=10, batch=4, budget=64)
    first, second, third = desk.add(8, 20), desk.add(8, 20), desk.add(8, 20, priority=-1)
    gone: list[Request] = []
    while desk.scheduler.open:
        running = list(desk.scheduler.running)
        desk.step()
        gone += [r for r in running if r.preemptions and r.table is None and r.finish_reason is None and r not in gone]
    assert gone == [second, first]
    assert third.preemptions == 0
    assert desk.ended == [third, first, second]
    assert all(r.generated == 20 for r in desk.ended)


def test_a_preempted_request_finds_its_pages_again_if_nobody_needed_them():
    desk = Desk(pages=20, budget=64)
    request = desk.add(9, 8)
    desk.step()
    desk.scheduler.preempt(request)
    assert (request.computed, request.missing) == (0, 10)
    (work,) = desk.step()
    assert work.count == 2  # two whole pages were still there
    assert request.cached_tokens == 0  # of its own, which is no hit of the cache


def test_n_completions_share_the_pages_of_their_prompt():
    desk = Desk(pages=100, budget=64)
    leader = desk.add(22, 4)
    for index in range(1, 5):
        desk.add(22, 4, leader=leader, index=index)
    desk.step()
    assert [r.generated for r in desk.scheduler.open] == [1, 0, 0, 0, 0]  # the others wait for it
    desk.step()
    tables = [r.table.pages[0] for r in desk.scheduler.open]
    assert len({tuple(pages[:5]) for pages in tables}) == 1  # whole pages of the prompt
    assert len({pages[5] for pages in tables}) == 5  # each writes on in its own
    pool = desk.tables.pools[0]
    assert pool.size - pool.free == 5 + 5
    desk.run()
    assert pool.free == pool.size


def test_the_prompt_of_n_completions_is_computed_once():
    desk = Desk(pages=100, budget=64, batch=16)
    leader = desk.add(40, 3)
    for index in range(1, 10):
        desk.add(40, 3, leader=leader, index=index)
    desk.run()
    computed = sum(work.count for works in desk.steps for work in works)
    assert computed == 40 + 9 * 1 + 10 * 2  # the last token of the prompt again: everybody draws from its logits


@pytest.mark.parametrize("other", [{"salt": "b"}, {"adapter": "fr"}])
def test_known_beginnings_are_those_of_the_same_salt_and_adapter(other):
    desk = Desk(pages=100, budget=64)
    desk.add(20, 1)
    desk.run()
    same, foreign = desk.add(20, 1), desk.add(20, 1, **other)
    desk.run()
    assert (same.cached_tokens, foreign.cached_tokens) == (16, 0)
    again = desk.add(20, 1, **other)
    desk.run()
    assert again.cached_tokens == 16


class Slow:
    """A lower tier that has everything, and brings it when it is told to."""

    def __init__(self, desk: Desk) -> None:
        self.futures: list[Future] = []
        desk.tables.lower = lambda key: True
        desk.scheduler.tiers.load = self.load

    def load(self, table, loads):
        started = [(group, table.pages[group].index(page), Future()) for group, page, _ in loads]
        self.futures += [future for *_, future in started]
        return started

    def come(self, *, lost: int | None = None) -> None:
        for number, future in enumerate(self.futures):
            future.set_result(number != lost)
        self.futures.clear()


def test_requests_that_load_hold_up_nobody():
    desk = Desk(budget=64)
    slow = Slow(desk)
    loads = desk.add(21, 2)
    short = desk.add(3, 6)
    while short.finish_reason is None:
        works = desk.step()
        assert [work.request for work in works] == [short]
    assert desk.scheduler.loading == [loads]
    slow.come()
    assert counts(desk.step()) == [1]
    assert loads.cached_tokens == 20
    desk.run()


def test_what_did_not_come_is_computed():
    desk = Desk(budget=64)
    slow = Slow(desk)
    request = desk.add(21, 2)
    assert desk.step() == []
    slow.come(lost=2)
    assert counts(desk.step()) == [21 - 8]  # two pages came in one piece
    assert request.cached_tokens == 8
    desk.run()


def test_a_request_that_lacks_pages_waits_for_those_that_load():
    desk = Desk(pages=8, budget=64)
    runs = desk.add(3, 24)
    desk.step()
    slow = Slow(desk)
    loads = desk.add(25, 2)  # takes what is left
    for _ in range(12):
        desk.step()
    assert desk.scheduler.hopeless == []
    assert desk.scheduler.loading == [loads]
    slow.come()
    desk.tables.lower = lambda key: False
    desk.run()
    assert (runs.generated, loads.generated) == (24, 2)


def test_a_request_that_comes_while_all_others_load_starts_at_once(model, tokenizer, tmp_path):
    """The disk is as slow as it likes: nobody else waits for it, and an abort is heard."""
    prompt = tokenizer.encode("lazy dog. " * 9)
    with Engine(model, tokenizer, page_size=4, disk_folder=tmp_path) as engine:
        engine.generate([prompt], GREEDY)
    gate = threading.Event()
    with Engine(model, tokenizer, page_size=4, disk_folder=tmp_path) as engine:
        disk = engine._memory.tiers.disk
        disk.flush()
        read = disk._read
        disk._read = lambda *args: gate.wait(20) and read(*args)
        try:
            slow = engine.submit(prompt, GREEDY)
            deadline = time.monotonic() + 10
            while not engine._worker._scheduler.loading and time.monotonic() < deadline:
                time.sleep(0.001)
            events = iter(engine.submit("f", GREEDY))
            first = [None]
            thread = threading.Thread(target=lambda: first.__setitem__(0, next(events)))
            thread.start()
            thread.join(10)
            assert first[0] is not None, "it waits for the disk of another request"
        finally:
            gate.set()
        assert sum(len(event.token_ids) for event in events) == 23
        last = list(slow)[-1].completion
        assert last.usage.cached_tokens == (len(prompt) - 1) // 4 * 4
