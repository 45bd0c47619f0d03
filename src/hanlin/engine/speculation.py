"""Speculative decoding (arXiv:2211.17192): guess a few tokens, verify them all in one step.

    guess        d1 d2 d3                            n-grams of the text, a small model, or the model's own heads
    one step     logits after …, d1, d2, d3          as if they were known
    choose       t1 | t2 t3 …                        each from the model's own distribution, until t_i ≠ d_i

A guess is kept exactly if the model chose the same token itself. That is speculative sampling with a guess that is
certain (accepted with probability p(d), otherwise drawn from p without d), so nothing about the output changes: the
same seed gives the same text with and without. What it costs is decided by measuring (`engine.governor`): where it
loses, it goes off by itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.engine.governor import SpeculationGovernor
from hanlin.engine.ngram_draft import NgramDraft, NgramIndex
from hanlin.engine.page_pool import PagePool
from hanlin.engine.paged_cache import PagedCache
from hanlin.engine.request import Request
from hanlin.engine.scheduler import Work
from hanlin.engine.tables import Table, Tables, groups_of
from hanlin.models.transformer import Transformer

if TYPE_CHECKING:
    from hanlin.engine.runner import Runner

READ = 512  # tokens of a prompt that a draft model reads between two steps: streams shall not wait for it
KEPT_STEPS = 64  # of hidden states that wait for a guess


class Proposer(Protocol):
    """wants_hidden: `see` is called with the hidden states of every step."""

    wants_hidden: bool

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[list[int]]:
        """For each sequence, which lacks one token, at most so many guesses of what follows its ids."""
        ...

    def see(self, works: Sequence[Work], hidden: Tensor) -> None: ...

    def forget(self, request: Request) -> None: ...


class Speculation:
    """What the worker asks for guesses."""

    def __init__(self, proposer: Proposer, governor: SpeculationGovernor) -> None:
        self._proposer, self._governor = proposer, governor

    @property
    def wants_hidden(self) -> bool:
        return self._proposer.wants_hidden

    def propose(self, requests: Sequence[Request]) -> dict[Request, list[int]]:
        ready = [r for r in requests if r.missing == 1 and r.search is None]
        lengths = [
            min(length, r.limit - r.generated - 1)
            for r, length in zip(ready, self._governor.lengths(ready), strict=True)
        ]
        asked = [(r, length) for r, length in zip(ready, lengths, strict=True) if length > 0]
        if not asked:
            return {}
        guesses = self._proposer.propose([r for r, _ in asked], [length for _, length in asked])
        return {r: guess for (r, _), guess in zip(asked, guesses, strict=True) if guess}

    def see(self, works: Sequence[Work], hidden: Tensor) -> None:
        self._proposer.see(works, hidden)

    def record(self, works: Sequence[Work], accepted: Sequence[int], seconds: float) -> None:
        """A step took so long; `seconds` includes the guessing."""
        for work, right in zip(works, accepted, strict=True):
            self._governor.saw(work.request, len(work.drafts), right)
        if all(work.sample and work.count == 1 for work in works):
            drafted = sum(len(work.drafts) for work in works)
            self._governor.record(seconds, len(works), drafted, sum(accepted))

    def forget(self, request: Request) -> None:
        self._governor.forget(request)
        self._proposer.forget(request)


class Ngrams:
    """Guesses from the text itself (`engine.ngram_draft`)."""

    wants_hidden = False

    def __init__(self, draft: NgramDraft) -> None:
        self._draft = draft
        self._states: dict[Request, NgramIndex] = {}

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[list[int]]:
        found = []
        for request, length in zip(requests, lengths, strict=True):
            state = self._states.setdefault(request, self._draft.start())
            found.append(self._draft.propose(request.ids, state, length))
        return found

    def see(self, works: Sequence[Work], hidden: Tensor) -> None:
        """The text is all it looks at."""

    def forget(self, request: Request) -> None:
        self._states.pop(request, None)


class DraftModel:
    """The likeliest continuation by a smaller model with the same tokens, which has pages of its own.

    pages: how many it has; a sequence for which none is left goes without guesses.
    """

    wants_hidden = False

    def __init__(self, model: Transformer, vocabulary: int, *, pages: int, page: int = 16) -> None:
        if model.config.vocab_size != vocabulary:
            raise HanlinError(
                f"The draft model knows {model.config.vocab_size} tokens and the model {vocabulary}; they must be the "
                "same."
            )
        self._model = model.eval()
        self._cache, self._tables = _own_pages(model, pages, page)
        self._states: dict[Request, tuple[Table, list[int]]] = {}  # pages, and the tokens they hold

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[list[int]]:
        longest = self._model.config.max_positions
        guesses: dict[Request, list[int]] = {r: [] for r in requests}
        open_requests = []
        for request, length in zip(requests, lengths, strict=True):
            table, held = self._states.setdefault(request, (self._tables.start(b""), []))
            known = min(common_beginning(held, request.ids), len(request.ids) - 1)
            del held[known:]
            total = len(request.ids) + length
            if total > longest or not self._tables.grow(table, known, total):
                continue
            if len(request.ids) - known > READ:
                self._forward([request], [request.ids[known : known + READ]])
            else:
                open_requests.append((request, length))
        while open_requests:
            asked = [r for r, _ in open_requests]
            for request, token in zip(asked, self._next(asked, guesses), strict=True):
                guesses[request].append(token)
            open_requests = [(r, length) for r, length in open_requests if len(guesses[r]) < length]
        return [guesses[r] for r in requests]

    def see(self, works: Sequence[Work], hidden: Tensor) -> None:
        """It reads the tokens itself."""

    def forget(self, request: Request) -> None:
        if request in self._states:
            self._tables.free(self._states.pop(request)[0], forget=True)

    def _next(self, requests: Sequence[Request], guesses: dict[Request, list[int]]) -> list[int]:
        """One more token of each: what its pages lack, in one flat batch."""
        new = [[*r.ids, *guesses[r]][len(self._states[r][1]) :] for r in requests]
        return self._model.logits(self._forward(requests, new)).argmax(-1).tolist()

    def _forward(self, requests: Sequence[Request], new: Sequence[list[int]]) -> Tensor:
        """Read new tokens of each: (requests, width), the hidden state of the last of them."""
        states = [self._states[r] for r in requests]
        step = self._cache.step(
            [len(held) for _, held in states], [len(ids) for ids in new], [table.pages for table, _ in states]
        )
        flat = torch.tensor([[token for ids in new for token in ids]], device=self._model.device)
        hidden = self._model(flat, cache=step, logits=None).hidden[0]
        for (_, held), ids in zip(states, new, strict=True):
            held += ids
        return hidden[torch.tensor([len(ids) for ids in new], device=hidden.device).cumsum(0) - 1]


class OwnHeads:
    """Multi-token prediction (`nn.multi_token`): the model's own modules guess, over pages of their own layers.

    Their keys and values lie in the model's pages, behind the last layer's, so they come and go with them. Where a page
    was taken over from another sequence its last token's were made with that one's next token, and where they were
    never made they are zeros: a guess is then worse, and nothing else.
    """

    wants_hidden = True

    def __init__(self, runner: "Runner") -> None:
        if runner.model.ahead is None:
            raise HanlinError("This model has no modules that predict further tokens (`predict_ahead`).")
        self._runner = runner
        # (first position, hidden states) of tokens that the modules have not read, oldest first
        self._waiting: dict[Request, list[tuple[int, Tensor]]] = {}

    def see(self, works: Sequence[Work], hidden: Tensor) -> None:
        """hidden (N, width): of all tokens of a step, sequence after sequence."""
        at = 0
        for work in works:
            size, request = work.count + len(work.drafts), work.request
            if request.search is None:
                self._keep(request, request.computed, hidden[at : at + size])
            at += size

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[list[int]]:
        able, rows, starts, next_ids = [], [], [], []
        for request in requests:
            if request not in self._waiting or request.table is None:
                continue
            start, hidden = _joined(self._waiting.pop(request), len(request.ids) - 1)
            first = max(start, self._first_held(request.table, len(request.ids) - 2))
            if first < len(request.ids) - 1:
                able.append(request)
                rows.append(hidden[first - start :])
                starts.append(first)
                next_ids.append(request.ids[first + 1 :])
        if not able:
            return [[] for _ in requests]
        tables = [[list(held) for held in r.table.pages] for r in able if r.table is not None]
        found = dict(zip(able, self._runner.draft(rows, starts, next_ids, tables), strict=True))
        return [found.get(r, [])[:length] for r, length in zip(requests, lengths, strict=True)]

    def forget(self, request: Request) -> None:
        self._waiting.pop(request, None)

    def _first_held(self, table: Table, last: int) -> int:
        """From which token up to `last` on the device has all pages of the modules' layers: a window may have let go of
        those before, or they lie on the host."""
        cache = self._runner.cache
        held = table.pages[cache.group_of[len(self._runner.model.config.layers)]]
        index = last // cache.page
        while index >= 0 and held[index] > 0:
            index -= 1
        return (index + 1) * cache.page

    def _keep(self, request: Request, start: int, hidden: Tensor) -> None:
        parts = self._waiting.setdefault(request, [])
        if parts and not parts[0][0] < start <= parts[-1][0] + len(parts[-1][1]):  # it was preempted, or had no guesses
            parts.clear()
        parts.append((start, hidden))
        if len(parts) > KEPT_STEPS:  # nobody asks for guesses: these tokens stay unread
            del parts[: KEPT_STEPS // 2]


def _joined(parts: Sequence[tuple[int, Tensor]], end: int) -> tuple[int, Tensor]:
    """One run of hidden states up to token `end`; behind a wrong guess the next part takes its place."""
    stops = [*[start for start, _ in parts[1:]], end]
    rows = [hidden[: stop - start] for (start, hidden), stop in zip(parts, stops, strict=True)]
    return parts[0][0], torch.cat(rows)


def common_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from the start; the end is looked at first, where sequences that grow
    part."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    return next(i for i in range(size) if a[i] != b[i])


def _own_pages(model: Transformer, pages: int, page: int) -> tuple[PagedCache, Tables]:
    groups = groups_of(model.config)
    cache = PagedCache(model.config, pages=[pages + 1] * len(groups), dtype=model.dtype, page=page, device=model.device)
    return cache, Tables(groups, [PagePool(pages + 1, first=1) for _ in groups], page)
