"""The thread that owns the pages: take what was submitted, plan a step, compute it, choose, deliver, again.

An error in a forward pass ends the requests of that pass, with the error as their last event, and no others; the thread
lives on. It holds no reference to the `Engine`, so that an engine nobody uses any more is collected and stops it.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.engine.constraints import Matcher
from hanlin.engine.request import Request
from hanlin.engine.runner import Plan, Result, Source
from hanlin.engine.sampling import BROKEN, Choice, Place, Sampler, prompt_logprobs
from hanlin.engine.scheduler import Scheduler, Work
from hanlin.engine.speculation import Speculation
from hanlin.engine.types import Busy, EngineStats

Run = Callable[[Plan], Result]
MaskPlaces = Sequence[tuple[Matcher, Sequence[int]] | None]
FillMasks = Callable[[MaskPlaces], Tensor]  # -> (places, words) int32: what may come next there

SOON = 0.005  # seconds
NOT_FINITE = (
    "The model gives no next token: its logits are not finite numbers (its weights are damaged, or too large for this "
    "precision: try dtype float32), or everything it could say is forbidden by bans and constraints."
)


class Worker:
    """run: computes a plan. max_open: requests under way and queued together; `submit` raises `Busy` past it."""

    def __init__(
        self, run: Run, scheduler: Scheduler, *, vocabulary: int, device: torch.device, max_open: int,
        fill_masks: FillMasks, drafter: Speculation | None = None,
    ) -> None:  # fmt: skip
        self._fill_masks = fill_masks
        self._run_plan, self._scheduler, self._max_open, self._drafter = run, scheduler, max_open, drafter
        self._sampler = Sampler(vocabulary, device)
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="hanlin-masks")
        self._wake = threading.Condition()
        self._inbox: list[Request] = []
        self._errands: list[tuple[Callable[[], object], Future]] = []
        self._open = 0
        self._closed = False
        self.checking = False  # after each step: every page is free or in exactly as many tables as hold it
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._computed_prompt = self._step_tokens = self._drafted = self._accepted = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._finished: Counter[str] = Counter()
        self._sources: dict[Source, int] = {}
        self._failed: list[tuple[Request, HanlinError]] = []  # in this step
        self._thread = threading.Thread(target=self._run, name="hanlin-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: list[Request], *, bounded: bool = True) -> None:
        """Queue all of them or none. bounded False: however many wait already."""
        with self._wake:
            if self._closed:
                raise HanlinError("The engine is closed; it takes no more requests.")
            if bounded and self._open and self._open + len(requests) > self._max_open:
                raise Busy(
                    f"The engine is busy: {self._open} sequences run or wait, and {len(requests)} more would pass its "
                    f"limit of {self._max_open}. Try again in a moment."
                )
            self._open += len(requests)
            self._inbox += requests
            self._wake.notify()

    def between_steps(self, errand: Callable[[], object]) -> Future:
        """Have something done by the worker's thread, when no step is under way."""
        future: Future = Future()
        with self._wake:
            if self._closed:
                raise HanlinError("The engine is closed.")
            self._errands.append((errand, future))
            self._wake.notify()
        return future

    def wake(self) -> None:
        """A request was aborted."""
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """Abort everything and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        running = len(scheduler.running)
        return EngineStats(
            running=running,
            waiting=max(0, self._open - running),
            cache_usage=scheduler.tables.usage,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            finished=dict(self._finished),
            preemptions=scheduler.preemptions,
            seconds=self._prefill_seconds + self._decode_seconds,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            computed_prompt_tokens=self._computed_prompt,
            step_tokens=self._step_tokens,
            drafted=self._drafted,
            accepted=self._accepted,
            host_pages=scheduler.tiers.host_pages,
            disk_pages=scheduler.tiers.disk_pages,
            loaded_pages=scheduler.tiers.loaded,
        )

    @property
    def _idle(self) -> bool:
        return not (self._closed or self._inbox or self._errands or self._scheduler.open)

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            while self._idle and self._scheduler.tiers.warm():
                pass
            with self._wake:
                while self._idle:
                    self._wake.wait()
                inbox, self._inbox = self._inbox, []
                errands, self._errands = self._errands, []
            for request in inbox:
                self._scheduler.add(request)
            for errand, future in errands:
                try:
                    future.set_result(errand())
                except Exception as error:
                    future.set_exception(error)
            if self._closed:
                break
            try:
                self._step()
            except Exception as error:  # a bug outside the model: nobody may wait for ever
                self._fail(self._scheduler.open, error)
        for request in self._scheduler.open:
            if request.finish_reason is None:
                request.abort()
                self._settle(request)
        self._masks.shutdown()

    def _step(self) -> None:
        for request in [r for r in self._scheduler.open if r.aborted and r.finish_reason is None]:
            request.abort()
            self._settle(request)
        began = time.perf_counter()
        drafts = {} if self._drafter is None else self._drafter.propose(self._scheduler.running)
        works = self._scheduler.plan(drafts)
        if hopeless := self._scheduler.hopeless:
            self._scheduler.hopeless = []
            message = "The sequence does not fit into the pages of this engine; raise cache_bytes, or host_bytes."
            self._fail(hopeless, HanlinError(message))
        if not works:
            self._wait_for_pages()
            return
        masks = self._start_masks(works)
        try:
            result = self._run_plan(self._plan_of(works))
            if self._drafter is not None and result.everything is not None:
                self._drafter.see(works, result.everything)
            allowed = None if masks is None else masks.result()
            accepted = self._choose(works, result, allowed)
        except Exception as error:
            self._fail([work.request for work in works], error)
            return
        self._count(works, accepted, time.perf_counter() - began)
        if self.checking:
            self._scheduler.check()
        for request, error in self._failed:
            self._fail([request], error, wipe=True)
        self._failed = []
        for request in [work.request for work in works]:
            if request.finish_reason is not None:
                self._settle(request)

    def _plan_of(self, works: Sequence[Work]) -> Plan:
        wanted: list[int] = []
        at = 0
        for work in works:
            size = work.count + len(work.drafts)
            if self._wants_all(work):
                wanted += range(at, at + size)
            elif work.sample:
                wanted += range(at + size - 1 - len(work.drafts), at + size)
            at += size
        tables = self._scheduler.tables
        copies, tables.copies = tables.copies, []
        wipes, tables.wipes = tables.wipes, []
        requests = [work.request for work in works]
        readers, sources, done = self._sources_of(requests)
        return Plan(
            [token for work in works for token in work.tokens],
            [r.computed for r in requests],
            [work.count + len(work.drafts) for work in works],
            [[list(held) for held in r.table.pages] for r in requests if r.table is not None],
            wanted,
            copies,
            any(r.search is not None and r.search.wants_hidden for r in requests),
            self._drafter is not None and self._drafter.wants_hidden,
            [None if r.adapter is None else r.adapter.key for r in requests],
            readers,
            sources,
            done,
            wipes,
        )

    def _sources_of(self, requests: Sequence[Request]) -> tuple[list[int], dict[int, Source], list[int]]:
        """Numbers for what an encoder reads: of each request, of those that are new, of those that nobody needs."""
        if all(r.source is None for r in requests) and not self._sources:
            return [], {}, []
        needed = {r.source for r in self._scheduler.open}
        done = [self._sources.pop(source) for source in list(self._sources) if source not in needed]
        new = {}
        for source in dict.fromkeys(r.source for r in requests if r.source is not None):
            if source not in self._sources:
                number = next(n for n in range(len(self._sources) + 1) if n not in self._sources.values())
                self._sources[source] = number
                new[number] = source
        return [self._sources[r.source] for r in requests if r.source is not None], new, done

    def _start_masks(self, works: Sequence[Work]) -> Future[Tensor] | None:
        """What constraints allow is found out while the model computes."""
        asked = [(work.request.matcher, work.drafts) for work in works if work.sample and not work.request.search]
        if all(matcher is None for matcher, _ in asked):
            return None
        places: list[tuple[Matcher, Sequence[int]] | None] = []
        for matcher, drafts in asked:
            places += [None] * (1 + len(drafts)) if matcher is None else [(matcher, drafts)]
        return self._masks.submit(self._fill_masks, places)

    def _choose(self, works: Sequence[Work], result: Result, allowed: Tensor | None) -> list[int]:
        """Next tokens for all that have caught up; returns the right guesses of each work."""
        places: list[Place] = []
        rows: list[int] = []
        searches: dict[Request, int] = {}
        at = 0
        for work in works:
            request, last = work.request, len(work.drafts)
            if self._wants_all(work):
                assert result.logits is not None
                if request.search is not None and result.hidden is not None:
                    request.search.see(
                        request.search.members.index(request), request.computed, result.hidden[at : at + work.count]
                    )
                else:
                    self._report_prompt(work, result.logits[at : at + work.count])
                at += work.count - work.sample
            if not work.sample:
                continue
            if request.search is not None:
                searches[request] = at
            else:
                rows += range(at, at + 1 + last)
                places += [Place(request.row, work.drafts[:n]) for n in range(1 + last)]
            at += 1 + last
        choices: list[Choice] = []
        if places:
            assert result.logits is not None
            logits = result.logits if len(rows) == len(result.logits) else result.logits[rows]
            choices = self._sampler.choose(logits, places, allowed)
        accepted, line = [], iter(choices)
        for work in works:
            took = 0
            if work.sample and work.request.search is None:
                took = self._accept(work, [next(line) for _ in range(1 + len(work.drafts))])
            accepted.append(took)
            self._scheduler.computed(work, took)
        self._advance_searches(searches, result)
        return accepted

    def _accept(self, work: Work, choices: Sequence[Choice]) -> int:
        """Take chosen tokens for as long as the guesses were right; returns how many were."""
        request = work.request
        request.drafted += len(work.drafts)
        for guess, choice in enumerate(choices):
            request.accepted += guess > 0  # the one before was right
            if choice.token == BROKEN:
                self._failed.append((request, HanlinError(NOT_FINITE)))
                return guess
            self._generated_tokens += 1
            try:
                request.accept(choice.token, choice.logprob)
            except HanlinError as error:  # a constraint that grew too complex
                self._failed.append((request, error))
                return guess
            right = guess < len(work.drafts) and work.drafts[guess] == choice.token
            if request.finish_reason is not None or not right:  # of the token that ended it nobody will ask
                return guess
        raise AssertionError("the last place has no guess behind it")

    def _advance_searches(self, rows: dict[Request, int], result: Result) -> None:
        """Let each search whose sequences have all caught up take its next step."""
        for search in dict.fromkeys(request.search for request in rows):
            assert search is not None and result.logits is not None
            members, tables = list(search.members), self._scheduler.tables
            logits = result.logits[[rows[member] for member in members]]
            branches = search.advance(self._sampler.log_probs(logits, [Place(member.row) for member in members]))
            self._generated_tokens += 1
            if not branches:
                continue
            parents = [members[branch.parent] for branch in branches]
            forks = [tables.fork(p.table, p.computed, p.computed) for p in parents if p.table is not None]
            computed = [parent.computed for parent in parents]
            for member in members:
                self._scheduler.retire(member)
            search.members = [*members, *[members[0].sibling() for _ in range(len(branches) - len(members))]]
            del search.members[len(branches) :]
            for member, branch, table, known in zip(search.members, branches, forks, computed, strict=True):
                assert table is not None, "a search lost pages that it still needs"
                member.branch(branch.ids)
                member.table, member.computed = table, known
                self._scheduler.running.append(member)

    def _wants_all(self, work: Work) -> bool:
        """Whether each token's logits, or hidden state, is asked for."""
        request = work.request
        if request.search is not None:
            return request.search.wants_hidden
        first = request.unscored_from
        return first < request.prompt_tokens and request.computed + work.count >= first

    def _report_prompt(self, work: Work, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens behind those that were computed: logits (count, V)."""
        request = work.request
        first = request.computed + 1  # the token that the first of these logits speaks about
        told = request.unscored_from  # those before it were reported, perhaps before a preemption, or not asked for
        targets = request.ids[max(first, told) : min(first + work.count, request.prompt_tokens)]
        skip = max(0, told - first)
        if targets:
            count = request.params.prompt_logprobs or 0
            request.prompt_logprobs += prompt_logprobs(logits[skip : skip + len(targets)], targets, count)

    def _count(self, works: Sequence[Work], accepted: Sequence[int], seconds: float) -> None:
        self._steps += 1
        prompt = sum(work.count for work in works if work.request.generated <= work.sample)
        total = sum(work.count + len(work.drafts) for work in works)
        self._step_tokens = total
        self._computed_prompt += prompt
        self._prefill_seconds += seconds * prompt / total
        self._decode_seconds += seconds * (total - prompt) / total
        self._drafted += sum(len(work.drafts) for work in works)
        self._accepted += sum(accepted)
        if self._drafter is not None:
            self._drafter.record(works, accepted, seconds)

    def _wait_for_pages(self) -> None:
        """Nothing can be computed before pages have come, or requests: both are looked for again soon."""
        for request in self._scheduler.loading[:1]:
            wait([future for *_, future in request.loading], timeout=SOON)

    def _fail(self, requests: Sequence[Request], error: Exception, *, wipe: bool = False) -> None:
        for request in list(requests):
            root = request if request.search is None else request.search.members[0]
            if root.finish_reason is None:
                root.fail(error)
                self._finished["error"] += 1
            if wipe and request.table is not None:
                self._scheduler.tables.wipes += self._scheduler.tables.alone(request.table)
            self._settle(root, forget=True)

    def _settle(self, request: Request, *, forget: bool = False) -> None:
        """Free the pages of a request that has ended, then tell its owner."""
        if request.settled:
            return
        for member in request.search.members if request.search is not None else []:
            self._scheduler.retire(member, forget=forget)
        self._scheduler.retire(request, forget=forget)
        if self._drafter is not None:
            self._drafter.forget(request)
        if not forget:
            self._finished[request.finish_reason or "abort"] += 1
            self._prompt_tokens += request.prompt_tokens
            self._cached_tokens += request.cached_tokens
        with self._wake:
            self._open -= 1
        request.settle()
