"""Who computes what in the next step.

There are no phases. A request has tokens and how many of them are computed; a step hands out one budget of tokens,
until what is computed has caught up: one token to a sequence that runs, a piece to a prompt that is being read, a few
more to one whose next tokens were guessed. Chunked prefill, prefix caching, speculation and the recomputing of what was
preempted are this one rule.

    waiting ──admit──▶ (loading) ──▶ running ──▶ ended           pages are taken as tokens are computed, never before
       ▲                               │
       └──────────── preempt ──────────┘                         the last in rank gives way when pages run out

Those that lack one token go first, then prompts, each in order of rank (priority, then arrival); so a long prompt costs
a running stream at most one step of the budget. Of those that wait with equal priority the next is of the client that
was served the fewest tokens (virtual token counter, arXiv:2401.00588), and nobody overtakes who came first of a client.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hanlin.engine.request import Request
from hanlin.engine.tables import Found, Tables
from hanlin.engine.tiers import Tiers

WORTH_SHARING = 16  # tokens of a prompt for which the other completions of it wait
Drafts = Mapping[Request, Sequence[int]]


@dataclass(frozen=True)
class Work:
    """The next `count` missing tokens of a request, and behind them guesses of what follows; sample: these are all that
    was missing, so a next token can be chosen."""

    request: Request
    count: int
    drafts: tuple[int, ...]
    sample: bool

    @property
    def tokens(self) -> list[int]:
        r = self.request
        return [*r.ids[r.computed : r.computed + self.count], *self.drafts]


class Scheduler:
    """tables: of pages; max_batch: sequences that run together; step_tokens: the budget."""

    def __init__(self, tables: Tables, tiers: Tiers, *, max_batch: int, step_tokens: int) -> None:
        self.tables, self.tiers, self.max_batch, self.step_tokens = tables, tiers, max_batch, step_tokens
        self.waiting: list[Request] = []
        self.loading: list[Request] = []
        self.running: list[Request] = []
        self.served: Counter[str] = Counter()
        self.preemptions = 0
        self.hopeless: list[Request] = []  # alone they found too few pages; the worker ends them
        self._arrivals = 0

    def add(self, request: Request) -> None:
        self._arrivals += 1
        request.arrival = self._arrivals
        client = request.owner.client
        if not any(r.owner.client == client for r in self.open):  # who comes back has not saved up turns meanwhile
            active = [self.served[r.owner.client] for r in self.open]
            self.served[client] = max(self.served[client], min(active, default=0))
        self.waiting.append(request)

    @property
    def open(self) -> list[Request]:
        return [*self.running, *self.loading, *self.waiting]

    def plan(self, drafts: Drafts) -> list[Work]:
        """The work of the next step. Empty where everything waits for pages to be loaded."""
        self._welcome_loaded()
        plan: dict[Request, Work] = {}
        preempted = self._continue(plan, drafts)
        if not preempted:
            self._admit(plan)
        while not plan and self.running and not self.loading:  # searches that hold each other up
            self.preempt(max(self.running, key=lambda r: r.rank))
            self._continue(plan, drafts)
        return list(plan.values())

    def computed(self, work: Work, accepted: int) -> None:
        """A step has computed `work`, and so many of its guesses were right."""
        request = work.request
        request.computed += work.count + accepted
        self.served[request.owner.client] += work.count + accepted
        if request.table is not None:
            self.tables.publish(request.table, request.ids, request.computed)

    def retire(self, request: Request, *, forget: bool = False) -> None:
        """A request has ended: let its pages go. forget: they may hold anything, after an error."""
        for line in (self.running, self.loading, self.waiting):
            if request in line:
                line.remove(request)
        self._let_go(request, forget=forget)

    def preempt(self, request: Request) -> None:
        """Take all pages from a request, and from the others of its search, until it is admitted again."""
        for member in request.search.members if request.search is not None else [request]:
            if member in self.running:
                self.running.remove(member)
                self._let_go(member)
                member.computed = 0
                member.preemptions += 1
                self.preemptions += 1
                self.waiting.append(member)

    def check(self) -> None:
        """AssertionError where a page is lost or held twice."""
        self.tables.check([r.table for r in self.open if r.table is not None])

    def _continue(self, plan: dict[Request, Work], drafts: Drafts) -> bool:
        """Hand the budget to those that run; whether one of them had to give way."""
        before = self.preemptions
        budget = self._left(plan)
        for request in sorted(self.running, key=lambda r: (r.missing > 1, r.rank)):
            if request in plan or request not in self.running or budget <= 0:
                continue
            together = [request]
            if request.search is not None and len(request.search.members) > 1:
                together = self._step_of_search(request)
                if not together or (together[0].missing == 1 and len(together) > budget):
                    continue
            for one in together:
                work = self._fit(one, budget, drafts.get(one, ()), alone=len(together) == 1)
                if work is None:
                    break
                plan[one] = work
                budget -= work.count + len(work.drafts)
            for gone in [r for r in plan if r not in self.running]:  # preempted after their turn
                budget += plan[gone].count + len(plan[gone].drafts)
                del plan[gone]
        return self.preemptions > before

    def _left(self, plan: Mapping[Request, Work]) -> int:
        return self.step_tokens - sum(work.count + len(work.drafts) for work in plan.values())

    def _step_of_search(self, request: Request) -> list[Request]:
        """The sequences of a search take their last missing token together; until all are so far, each only catches
        up."""
        members = request.search.members if request.search is not None else []
        if all(member in self.running and member.missing == 1 for member in members):
            return list(members)
        return [request] if request.missing > 1 else []

    def _fit(self, request: Request, budget: int, drafts: Sequence[int], *, alone: bool) -> Work | None:
        """Work for a request in pages that it has now; None where it had to give way itself."""
        count = min(request.missing, budget)
        if request.search is not None and len(request.search.members) > 1 and request.missing > 1:
            count = min(request.missing - 1, budget)
        guesses = tuple(drafts)[: budget - count] if count == request.missing and alone else ()
        assert request.table is not None
        while not self.tables.grow(request.table, request.computed, request.computed + count + len(guesses)):
            rivals = [r for r in self.running if r is not request and (not r.search or r.search is not request.search)]
            last = max(rivals, key=lambda r: r.rank, default=None)
            if guesses:
                guesses = ()
            elif last is not None and last.rank > request.rank:
                self.preempt(last)
            elif last is not None:
                self.preempt(request)
                return None
            elif self.tiers.spill(request.table, request.computed):
                continue
            elif count > 1:  # alone, and its piece is too large for the pages there are
                count //= 2
            elif self.loading:  # these hold the others; once they run, one of them gives way
                return None
            else:
                self.preempt(request)
                self.hopeless.append(request)
                return None
        return Work(request, count, guesses, count == request.missing)

    def _admit(self, plan: dict[Request, Work]) -> None:
        """Let waiting requests in, as long as there are places, pages and budget."""
        # one comparison a request and step: queues are short, and `served` changes with every step
        self.waiting.sort(key=lambda r: (r.owner.priority, self.served[r.owner.client], r.arrival))
        for request in list(self.waiting):
            if self._left(plan) <= 0 or len(self.running) + len(self.loading) >= self.max_batch:
                return
            if self._is_early(request):
                continue
            if not self._start(request):
                return
            self.waiting.remove(request)
            if request.loading:
                self.loading.append(request)
                continue
            self.running.append(request)
            self._continue(plan, {})

    def _start(self, request: Request) -> bool:
        """Give a waiting request a table that begins with all that is known of its tokens."""
        if self._fork_of_leader(request):
            return True
        table = self.tables.start(request.root, request.hashes)
        found = self.tables.find(table, request.ids, request.sharable)
        pages = -(-(len(request.ids) + 1) // self.tables.page)
        short = any(
            group.window is None and pages - sum(isinstance(p, int) and pool.holders(p) > 0 for p in row) > pool.free
            for group, row, pool in zip(self.tables.groups, found.places, self.tables.pools, strict=True)
        )
        if short and (self.running or self.loading):
            return False
        loads = self.tables.take_over(table, found)
        if loads is None and (self.running or self.loading):
            return False
        if loads is None:  # more is known than fits at once
            found, loads = Found(0, []), []
            table = self.tables.start(request.root, request.hashes)
        request.table, request.computed = table, found.tokens
        self._note_hit(request, found.tokens)
        if loads:
            request.loading = self.tiers.load(table, loads)
        return True

    def _note_hit(self, request: Request, found: int) -> None:
        if not request.preemptions:
            request.cached_tokens = min(found, request.prompt_tokens)

    def _fork_of_leader(self, request: Request) -> bool:
        """The pages of another completion of the same prompt that has read it."""
        leader = request.leader
        if leader is None or leader.table is None or leader.computed < request.prompt_tokens or request.generated:
            return False
        if not request.sharing:
            return False
        known = request.prompt_tokens - 1
        table = self.tables.fork(leader.table, request.prompt_tokens, known)
        if table is None:
            return False
        request.table, request.computed = table, known
        self._note_hit(request, known)
        return True

    def _is_early(self, request: Request) -> bool:
        """Its prompt is being read by another completion of the same: soon there is something to take over."""
        leader = request.leader
        reading = leader is not None and leader.missing > 1 and (leader in self.running or leader in self.loading)
        return reading and request.prompt_tokens > WORTH_SHARING

    def _welcome_loaded(self) -> None:
        """Pages that were asked of a lower tier have come, or not: then what stands behind them is computed."""
        for request in [r for r in self.loading if all(future.done() for *_, future in r.loading)]:
            lost = [(group, index) for group, index, future in request.loading if not future.result()]
            self.loading.remove(request)
            request.loading = []
            if lost and request.table is not None:
                request.computed = self.tables.cut(request.table, request.computed, lost)
                request.cached_tokens = min(request.cached_tokens, request.computed)
            self.running.append(request)

    def _let_go(self, request: Request, *, forget: bool = False) -> None:
        if request.table is not None:
            for *_, future in request.loading:
                future.result()  # nobody may write into pages that are free
            request.loading = []
            self.tables.free(request.table, forget=forget)
            request.table = None
