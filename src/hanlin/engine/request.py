"""A sequence on its way through the engine, and the handle by which its owner follows it.

A `Request` is one completion: a prompt with `n = 3` is three of them. It belongs to the worker thread; other threads
only set `aborted`.
"""

import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

from hanlin.core.seeds import derive
from hanlin.engine.sampling import Row
from hanlin.engine.text import Spelling, TextStream
from hanlin.engine.types import Completion, Event, FinishReason, SamplingParams, TokenLogprob, Usage

Deliver = Callable[[Event | Exception], None]


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
        quiet: bool = False,
        index: int = 0,
        leader: "Request | None" = None,
    ) -> None:
        self.params, self.index, self.leader = params, index, leader
        self.ids, self.prompt_tokens, self.computed = list(prompt), len(prompt), 0
        self.cached_tokens = 0
        self.aborted = False
        self.finish_reason: FinishReason | None = None
        own = () if params.seed is None else (derive(params.seed, index),)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else end_ids)
        self.row = Row(params, self.ids, len(prompt), sorted(ends), random.Random(*own))
        self._ends, self._limit = ends, min(params.max_tokens, room)
        self._spelling, self._stream = spelling, TextStream(params.stop)
        self._deliver, self._quiet = deliver, quiet
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._submitted = time.perf_counter()
        self._first_token_s = 0.0
        self._last: Event | Exception | None = None

    @property
    def missing(self) -> int:
        """Tokens that the next logits still need."""
        return len(self.ids) - self.computed

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_tokens

    def accept(self, token: int, logprob: TokenLogprob | None) -> None:
        """The next token; delivers its event, or ends the request (`finish_reason`)."""
        if not self.generated:
            self._first_token_s = time.perf_counter() - self._submitted
        self.ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if token in self._ends:
            self._end("stop", self._stream.finish(), [token], logprob)
            return
        text = self._stream.push(self._spelling(token), watch=self.generated >= self.params.min_tokens)
        if self._stream.stopped:
            self._end("stop", text, [token], logprob)
        elif self.generated >= self._limit:
            text += self._stream.finish()
            self._end("stop" if self._stream.stopped else "length", text, [token], logprob)
        else:
            self._pieces.append(text)
            if not self._quiet:
                self._deliver(Event(text, [token], None if logprob is None else [logprob], self.index))

    def abort(self) -> None:
        """End it with what there is."""
        self._end("abort", self._stream.finish(), [], None)

    def fail(self, error: Exception) -> None:
        self.finish_reason, self._last = "abort", error

    def settle(self) -> None:
        """Deliver how it ended. The worker calls this when the request's place is free again, not before."""
        assert self._last is not None
        self._deliver(self._last)

    def _end(self, reason: FinishReason, text: str, new: list[int], logprob: TokenLogprob | None) -> None:
        self.finish_reason = reason
        self._pieces.append(text)
        wanted = self.params.logprobs is not None
        usage = Usage(
            self.prompt_tokens,
            self.generated,
            self._first_token_s,
            time.perf_counter() - self._submitted,
            self.cached_tokens,
        )
        completion = Completion(
            "".join(self._pieces),
            self.ids[self.prompt_tokens :],
            self._logprobs if wanted else None,
            reason,
            usage,
            self.index,
        )
        pieces = [] if logprob is None else [logprob]
        self._last = Event(text, new, pieces if wanted else None, self.index, completion)


class RequestHandle:
    """A request under way: iterate its events (blocking), or `abort()` it.

    With `on_event` there is nothing to iterate: it is called from the worker thread with each event, or with the
    exception that ended the request, and must return at once. If it raises, the request is aborted.
    """

    def __init__(self, wake: Callable[[], None], on_event: Deliver | None = None) -> None:
        self.requests: list[Request] = []
        self._wake = wake
        self._events: SimpleQueue[Event | Exception] = SimpleQueue()
        self._on_event = on_event

    def deliver(self, event: Event | Exception) -> None:
        if self._on_event is None:
            self._events.put(event)
            return
        try:
            self._on_event(event)
        except Exception:
            traceback.print_exc()
            self.abort()

    def __iter__(self) -> Iterator[Event]:
        if self._on_event is not None:
            raise TypeError("This request's events go to its `on_event`; there is nothing to iterate.")
        left = len(self.requests)
        try:
            while left:
                event = self._events.get()
                if isinstance(event, Exception):
                    raise event
                left -= event.completion is not None
                yield event
        finally:
            if left:
                self.abort()

    def abort(self) -> None:
        """Stop computing it; its last event comes with finish_reason "abort". Harmless once it has ended."""
        for request in self.requests:
            request.aborted = True
        self._wake()
