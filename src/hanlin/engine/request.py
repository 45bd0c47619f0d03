"""A sequence on its way through the engine.

A `Request` is one completion: a prompt with `n = 3` is three of them, and a search (`engine.search`) computes several
for one answer. It belongs to the worker thread; other threads only set `aborted`.
"""

import copy
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hanlin.core.seeds import derive
from hanlin.engine.sampling import Row
from hanlin.engine.tables import Table
from hanlin.engine.text import Spelling, TextStream
from hanlin.engine.types import Completion, Event, FinishReason, SamplingParams, TokenLogprob, Usage

if TYPE_CHECKING:
    from hanlin.engine.adapters import Adapter
    from hanlin.engine.constraints import Matcher
    from hanlin.engine.search import Search

Deliver = Callable[[Event | Exception], None]


@dataclass(frozen=True)
class Owner:
    """Whose request it is: what it may share, and when it is its turn.

    adapter: a loaded adapter; salt: nothing is shared with requests of another salt; priority: lower goes first;
    client: of equal priority, the client that was served least goes first. source: what the encoder of a model that has
    one reads.
    """

    adapter: str | None = None
    salt: str = ""
    priority: int = 0
    client: str = ""
    source: tuple[int, ...] | None = None


class Request:
    """ids: prompt and output so far; computed: how many of them the cache holds. `finish_reason` once it has ended.

    deliver: gets the events, or the exception that ended it. quiet: only the last event is wanted.
    leader: the first completion of the same prompt, whose computed prompt the others take over.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        spelling: Spelling,
        end_ids: frozenset[int],
        room: int,
        deliver: Deliver,
        owner: Owner | None = None,
        quiet: bool = False,
        index: int = 0,
        leader: "Request | None" = None,
        matcher: "Matcher | None" = None,
    ) -> None:
        self.params, self.index, self.leader, self.matcher = params, index, leader, matcher
        self.owner = owner or Owner()
        self.ids, self.prompt_tokens, self.computed = list(prompt), len(prompt), 0
        self.table: Table | None = None
        self.root = b""
        self.hashes: list[bytes] = []  # of its full pages, made once however often it waits
        self.arrival = 0
        self.cached_tokens = self.preemptions = self.drafted = self.accepted = 0
        self.adapter: Adapter | None = None
        self.search: Search | None = None
        self.loading: list[tuple[int, int, Future[bool]]] = []  # (group, index in the table, whether it came)
        self.aborted = False
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprob] = []
        self.ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else end_ids)
        seed = random.getrandbits(63) if params.seed is None else derive(params.seed, index)
        self.row = Row(params, self.ids, len(prompt), sorted(self.ends), seed)
        self.limit = min(params.max_tokens, room)
        self.spelling, self._stream = spelling, TextStream(params.stop, include=params.include_stop)
        self.deliver, self._quiet = deliver, quiet
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._submitted = time.perf_counter()
        self._first_token_s = 0.0
        self._last: list[Event | Exception] = []
        self.settled = False

    @property
    def missing(self) -> int:
        """Tokens that the next logits still need."""
        return len(self.ids) - self.computed

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def source(self) -> tuple[tuple[int, ...], str | None] | None:
        """What an encoder reads for it: the tokens, and the key of the adapter it reads them with."""
        source = self.owner.source
        return None if source is None else (source, None if self.adapter is None else self.adapter.key)

    @property
    def rank(self) -> tuple[int, int]:
        """Who is served first, and preempted last."""
        return self.owner.priority, self.arrival

    @property
    def sharing(self) -> bool:
        """Whether known pages may stand for all of its prompt: not where logits or hidden states of it are wanted."""
        return self.unscored_from == self.prompt_tokens and (self.search is None or self.search.sharing)

    @property
    def unscored_from(self) -> int:
        """The first token of the prompt whose log-probability is still to be reported; its length where none is."""
        if self.params.prompt_logprobs is None:
            return self.prompt_tokens
        return min(self.params.prompt_logprobs_from + len(self.prompt_logprobs), self.prompt_tokens)

    @property
    def sharable(self) -> int:
        """How many of its first tokens known pages may stand for: at most all but the last, whose logits are needed."""
        if self.sharing:
            return len(self.ids) - 1
        return 0 if self.search is not None else self.unscored_from - 1

    def accept(self, token: int, logprob: TokenLogprob | None) -> None:
        """The next token; delivers its event, or ends the request (`finish_reason`)."""
        if not self.generated:
            self._first_token_s = time.perf_counter() - self._submitted
        self.ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if token in self.ends:
            self._end("stop", self._stream.finish(), [token], logprob, stop=token)
            return
        if self.matcher is not None:
            self.matcher.accept(token)
        text = self._stream.push(self.spelling(token), watch=self.generated >= self.params.min_tokens)
        if self._stream.stopped:
            self._end("stop", text, [token], logprob, stop=self._stream.found)
        elif self.generated >= self.limit:
            text += self._stream.finish()
            self._end("stop" if self._stream.stopped else "length", text, [token], logprob, stop=self._stream.found)
        else:
            self._pieces.append(text)
            if not self._quiet:
                self.deliver(Event(text, [token], None if logprob is None else [logprob], self.index))

    def branch(self, ids: Sequence[int]) -> None:
        """Go on with other tokens (a search)."""
        self.ids[:] = ids
        self.hashes = []
        self.row = Row(self.params, self.ids, self.prompt_tokens, sorted(self.ends), self.row.seed)

    def sibling(self) -> "Request":
        """Another sequence of the same search; only the first of them tells its owner anything."""
        other = copy.copy(self)
        other.ids, other.table, other.computed, other.hashes = list(self.ids), None, 0, []
        other.loading, other.settled = [], True
        return other

    def abort(self) -> None:
        """End it with what there is."""
        if self.search is not None:
            self.end_search([], reason="abort")
        else:
            self._end("abort", self._stream.finish(), [], None)

    def fail(self, error: Exception) -> None:
        self.finish_reason = "abort"
        self._last = [error]

    def end_search(self, found: Sequence[tuple[list[int], float]], *, reason: FinishReason = "length") -> None:
        """The answers of a search, best first: (the generated tokens, score) each. Fewer than were asked for: the rest
        are empty."""
        wanted = [*found[: self.params.n], *[([], float("-inf"))] * (self.params.n - len(found))]
        self.finish_reason = reason
        self._last = []
        for index, (ids, score) in enumerate(wanted):
            ended = bool(ids) and ids[-1] in self.ends
            stream = TextStream(self.params.stop, include=self.params.include_stop)
            text = "".join(stream.push(self.spelling(token)) for token in ids) + stream.finish()
            why: FinishReason = "stop" if ended or stream.stopped else reason
            stop = ids[-1] if ended else stream.found
            completion = Completion(text, ids, None, why, self._usage(len(ids)), index, None, score, stop)
            self._last.append(Event(text, list(ids), None, index, completion))

    def settle(self) -> None:
        """Deliver how it ended. The worker calls this when the request's place is free again, not before."""
        self.settled = True
        for event in self._last:
            self.deliver(event)

    def _end(
        self, reason: FinishReason, text: str, new: list[int], logprob: TokenLogprob | None,
        *, stop: str | int | None = None,
    ) -> None:  # fmt: skip
        self.finish_reason = reason
        self._pieces.append(text)
        wanted = self.params.logprobs is not None
        completion = Completion(
            "".join(self._pieces),
            self.ids[self.prompt_tokens :],
            self._logprobs if wanted else None,
            reason,
            self._usage(self.generated),
            self.index,
            None if self.params.prompt_logprobs is None else self.prompt_logprobs,
            stop=stop,
        )
        pieces = [] if logprob is None else [logprob]
        self._last = [Event(text, new, pieces if wanted else None, self.index, completion)]

    def _usage(self, generated: int) -> Usage:
        return Usage(
            self.prompt_tokens,
            generated,
            self._first_token_s,
            time.perf_counter() - self._submitted,
            self.cached_tokens,
            self.preemptions,
            self.drafted,
            self.accepted,
        )


class BestOf:
    """Of `drawn` completions the `n` with the highest mean log-probability, delivered when the last has ended."""

    def __init__(self, params: SamplingParams, deliver: Deliver) -> None:
        self._params, self._deliver = params, deliver
        self._found: list[tuple[float, Event]] = []
        self._failed = False

    def __call__(self, event: Event | Exception) -> None:
        if isinstance(event, Exception):
            if not self._failed:
                self._deliver(event)
            self._failed = True
            return
        if event.completion is None or self._failed:
            return
        logprobs = event.completion.logprobs or []
        mean = sum(token.logprob for token in logprobs) / max(1, len(logprobs))
        self._found.append((mean, event))
        if len(self._found) < self._params.copies:
            return
        for index, (score, best) in enumerate(sorted(self._found, key=lambda pair: -pair[0])[: self._params.n]):
            assert best.completion is not None
            kept = best.completion.logprobs if self._params.logprobs is not None else None
            whole = replace(best.completion, index=index, score=score, logprobs=kept)
            self._deliver(Event(whole.text, whole.token_ids, kept, index, whole))


def with_logprobs(params: SamplingParams) -> SamplingParams:
    """The same, with the chosen tokens' log-probabilities at least."""
    changed: dict[str, Any] = {} if params.logprobs is not None else {"logprobs": 0}
    return replace(params, **changed)
