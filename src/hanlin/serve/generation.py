"""`Generation`: requests on their way through the engine, seen from the event loop.

The engine's worker thread calls back; each event crosses to the loop with `call_soon_threadsafe` and waits in a queue
there. Whoever started a generation ends it: `abort` frees its places in the engine, and is harmless when it has ended.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from fastapi import Request

from hanlin.engine import Completion, Engine, Event, RequestHandle, SamplingParams
from hanlin.serve.metrics import Watch


class Generation:
    """One or several prompts under way with the same parameters. Raises what `Engine.submit` raises; then none runs.

    watch: takes the times for /metrics.
    """

    def __init__(
        self, engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, *, watch: Watch | None = None
    ) -> None:
        self.parts = len(prompts) * params.n
        self._n = params.n
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._handles: list[RequestHandle] = []
        try:
            for prompt, ids in enumerate(prompts):
                self._handles.append(engine.submit(ids, params, on_event=partial(self._receive, prompt)))
        except BaseException:
            self.abort()
            raise

    def _receive(self, prompt: int, event: Event | Exception) -> None:
        """In the worker thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down and nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, (prompt, event))

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """(which completion, event) as they come: completion i of prompt p is number p * n + i."""
        open_parts = self.parts
        while open_parts:
            prompt, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            open_parts -= event.completion is not None
            part = prompt * self._n + event.index
            if self._watch is not None:
                self._watch.see(part, event)
            yield part, event

    async def completions(self) -> list[Completion]:
        """All of them, when the last has ended."""
        whole: list[Completion | None] = [None] * self.parts
        async for part, event in self.events():
            if event.completion is not None:
                whole[part] = event.completion
        return [completion for completion in whole if completion is not None]

    def abort(self) -> None:
        for handle in self._handles:
            handle.abort()

    @contextlib.asynccontextmanager
    async def watched(self, request: Request) -> AsyncGenerator[None]:
        """While inside, a client that hangs up aborts the generation."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.abort()

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            self.abort()
