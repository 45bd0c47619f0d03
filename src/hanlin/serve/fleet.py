"""`Fleet`: several replicas of one application, and how a request and its answer travel between processes.

A request is an `Ask`, plain values and the whole body; its answer the messages of ASGI
(https://asgi.readthedocs.io/en/latest/specs/www.html), one by one, so that a stream stays one.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.types import ASGIApp, Message

log = logging.getLogger("hanlin.serve")

SETTLING = 5.0  # seconds that an application has to clean up after its client left


class ReplicaLostError(Exception):
    """A replica died, or left, before its answer was whole."""


@dataclass(frozen=True)
class Ask:
    """A request on its way to a replica. scope: ASGI's, only plain values. key: of `affinity`; replica: this one."""

    scope: Mapping[str, Any]
    body: bytes = b""
    key: bytes | None = None
    replica: str | None = None


@dataclass(frozen=True)
class Whole:
    """An answer at its end. number: of the replica that gave it; one that replaces another has its number."""

    status: int
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    number: int = 0


class Fleet(Protocol):
    """The replicas."""

    def ask(self, ask: Ask) -> AsyncGenerator[Message]:
        """ASGI's messages of the answer; closing it aborts. Raises `ReplicaLostError`."""
        ...

    async def ask_all(self, ask: Ask) -> dict[str, Whole]:
        """Replica's name -> its answer, of those that live."""
        ...


async def answer_of(app: ASGIApp, ask: Ask, *, pause: Callable[[], float] = lambda: 0.0) -> AsyncGenerator[Message]:
    """What an application answers, message by message; closed before the end, it learns that the client left.

    pause: seconds between two pieces of the body; what comes meanwhile goes together.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    body: list[Message] = [{"type": "http.request", "body": ask.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.put_nowait(message)

    async def run() -> None:
        try:
            await app({**ask.scope}, receive, send)
        except Exception:  # the application has answered 500 already
            log.exception("A request failed.")
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        ended = False
        while not ended:
            waiting = [await sent.get()]
            while not sent.empty():
                waiting.append(sent.get_nowait())
            ended = waiting[-1] is None
            for message in _joined(message for message in waiting if message is not None):
                yield message
                if not ended and message["type"] == "http.response.body":
                    await asyncio.sleep(pause())
    finally:
        left.set()
        await asyncio.wait({task}, timeout=SETTLING)
        task.cancel()


def _joined(messages: Iterable[Message]) -> Iterator[Message]:
    """The same answer with neighbouring pieces of the body as one."""
    pieces: Message | None = None
    for message in messages:
        if message["type"] != "http.response.body":
            yield message
        elif pieces is None:
            pieces = message
        else:
            pieces = {**message, "body": pieces.get("body", b"") + message.get("body", b"")}
    if pieces is not None:
        yield pieces


async def whole_answer_of(app: ASGIApp, ask: Ask, number: int = 0) -> Whole:
    """The same at its end."""
    head: Message = {}
    body = b""
    async with contextlib.aclosing(answer_of(app, ask)) as messages:
        async for message in messages:
            head = head or message
            body += message.get("body", b"")
    return Whole(head["status"], list(head.get("headers", ())), body, number)
