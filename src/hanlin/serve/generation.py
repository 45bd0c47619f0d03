"""`Generation`: requests on their way through the engine, seen from the event loop.

The engine's worker thread calls back; each event crosses to the loop with `call_soon_threadsafe` and waits in a queue
there. Whoever started a generation ends it: `abort` frees its places in the engine, and is harmless when it has ended.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial

from fastapi import Request

from hanlin.engine import Completion, Engine, Event, RequestHandle, SamplingParams
from hanlin.serve.access import account_of
from hanlin.serve.errors import ApiError
from hanlin.serve.limits import Account
from hanlin.serve.metrics import Watch
from hanlin.serve.models import Served
from hanlin.serve.sampled import Sampled


@dataclass(frozen=True)
class Manner:
    """How prompts are run, besides their sampling. seconds: after which the generation is given up."""

    adapter: str | None = None
    priority: int = 0
    salt: str = ""
    account: Account | None = None
    seconds: float | None = None


class Generation:
    """One or several prompts under way with the same parameters. Raises what `Engine.submit` raises; then none runs.

    watch: takes the times for /metrics. loop: the running one, needed if this is made in another thread.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        watch: Watch | None = None,
        manner: Manner | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        manner = manner or Manner()
        self.parts = len(prompts) * params.n
        self._n = params.n
        self._watch, self._account = watch, manner.account
        self._deadline = None if manner.seconds is None else time.monotonic() + manner.seconds
        self._aborted = False
        self._loop = loop or asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._handles: list[RequestHandle] = []
        try:
            for prompt, ids in enumerate(prompts):
                handle = engine.submit(
                    ids,
                    params,
                    adapter=manner.adapter,
                    priority=manner.priority,
                    salt=manner.salt,
                    client="" if manner.account is None else manner.account.key.name,
                    on_event=partial(self._receive, prompt),
                )
                self._handles.append(handle)
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
            prompt, event = await self._next()
            if isinstance(event, Exception):
                raise event
            part = prompt * self._n + event.index
            if self._watch is not None:
                self._watch.see(part, event)
            if event.completion is not None:
                open_parts -= 1
                if self._account is not None:
                    self._account.charge(event.completion.usage.completion_tokens)
                if event.completion.finish_reason == "abort" and not self._aborted:
                    raise ApiError(503, "The server ended this answer before it was whole.", code="aborted")
            yield part, event

    async def _next(self) -> tuple[int, Event | Exception]:
        if self._deadline is None:
            return await self._events.get()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                return await self._events.get()
        except TimeoutError as error:
            self.abort()
            raise ApiError(408, "The answer took longer than this server allows.", code="timeout") from error

    async def completions(self) -> list[Completion]:
        """All of them, when the last has ended."""
        whole: list[Completion | None] = [None] * self.parts
        async for part, event in self.events():
            if event.completion is not None:
                whole[part] = event.completion
        return [completion for completion in whole if completion is not None]

    def abort(self) -> None:
        self._aborted = True
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


async def start(
    request: Request, served: Served, body: Sampled, prompts: Sequence[list[int]], params: SamplingParams
) -> Generation:
    """Set prompts on their way as a request wishes. In a thread: submitting may compile a grammar."""
    account = account_of(request)
    manner = Manner(
        adapter=served.adapter,
        priority=body.priority,
        salt=body.cache_salt,
        account=account,
        seconds=request.app.state.request_seconds,
    )
    watch = request.app.state.metrics[served.base].watch()
    loop = asyncio.get_running_loop()
    making = asyncio.ensure_future(
        asyncio.to_thread(Generation, served.engine, prompts, params, watch=watch, manner=manner, loop=loop)
    )
    try:
        generation = await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_abandon)
        raise
    account.charge(sum(map(len, prompts)))
    return generation


def _abandon(making: "asyncio.Future[Generation]") -> None:
    """Nobody waits any more for what has just been started."""
    if not making.cancelled() and making.exception() is None:
        making.result().abort()
