"""The handle by which the owner of a request follows it."""

import traceback
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from hanlin.engine.request import Deliver, Request
from hanlin.engine.types import Event


class RequestHandle:
    """A request under way: iterate its events (blocking), or `abort()` it. expected: completions that it will give.

    With `on_event` there is nothing to iterate: it is called from the worker thread with each event, or with the
    exception that ended the request, and must return at once. If it raises, the request is aborted.
    """

    def __init__(self, wake: Callable[[], None], expected: int, on_event: Deliver | None = None) -> None:
        self.requests: list[Request] = []
        self._wake, self._expected = wake, expected
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
        left = self._expected
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
