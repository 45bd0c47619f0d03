"""Replicas on Ray Serve: each a process with its own engines and the application of `app.create_app` around them.

    hanlin serve MODEL --replicas 2
        front (`front.py`, this process, one address) ── Ray Serve's handle ──▶ Replica 0
                                                         AffinityRouter   └──▶ Replica 1

Ray Serve starts the replicas, watches them and replaces one that dies; its own HTTP proxy is left out, for the front has
to read a prompt before it can choose. All of it lives on this machine behind 127.0.0.1 and a token of its own, tells
nobody anything, and is gone, with its folder of logs, when the context ends.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from starlette.types import Message

from hanlin.core.errors import HanlinError, require
from hanlin.serve.affinity import choose_replica
from hanlin.serve.front import Ask, Fleet, ReplicaLostError, Whole
from hanlin.serve.limits import Key

log = logging.getLogger("hanlin.serve")

PRIVATE = {  # read by Ray when it is imported and by the processes that it starts
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}
MANY = 4096  # requests in one replica: never reached, for the engine's own bounded queue answers 429 before
OBJECT_BYTES = 80 << 20  # of Ray's shared memory: answers are small and go another way
PATIENCE = 30.0  # seconds without any living replica after which a request is given up


@dataclass(frozen=True)
class Offer:
    """What every replica serves. folders: name -> model folder; adapters: on the first; limits: the engine's.

    keys: who may ask. A bound on requests under way is the front's; one on tokens cannot be counted there: refused.
    """

    folders: Mapping[str, str]
    limits: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    api_key: str | None = None
    keys: Sequence[Key] = ()
    request_seconds: float | None = None

    def __post_init__(self) -> None:
        for key in self.keys:
            if key.tokens_per_minute is not None:
                raise HanlinError(
                    f"The key '{key.name}' has tokens_per_minute, which each replica would count for itself. Leave it "
                    "out with --replicas; max_concurrent works."
                )


class Replica:
    """One process: the engines, the application, and answers as ASGI's messages. problem: file for a start's error."""

    def __init__(self, offer: Offer, threads: int, problem: Path) -> None:
        import torch
        from ray import serve

        from hanlin.engine import Engine
        from hanlin.serve.app import create_app

        torch.set_num_threads(threads)
        context = serve.get_replica_context()
        self._name, self._number = context.replica_id.unique_id, context.rank.rank
        limits = dict(offer.limits)
        if limits.get("disk_folder") is not None:  # pages on disk belong to one process; its successor finds them
            limits["disk_folder"] = Path(limits["disk_folder"]) / f"replica-{self._number}"
        self._engines: dict[str, Engine] = {}
        try:
            for name, folder in offer.folders.items():
                loaded = {} if self._engines else dict(offer.adapters)
                self._engines[name] = Engine.from_folder(folder, adapters=loaded, **limits)
        except HanlinError as error:
            problem.write_text(str(error), encoding="utf-8")
            raise
        keys = [replace(key, max_concurrent=None) for key in offer.keys]
        self._app = create_app(self._engines, api_key=offer.api_key, keys=keys, request_seconds=offer.request_seconds)
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, ask: Ask) -> AsyncGenerator[Message]:
        """The answer's messages, as they come. Closed before the end, the application learns that the client left."""
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
                await self._app({**ask.scope}, receive, send)
            except Exception:  # the application has answered 500 already
                log.exception("A request failed.")
            finally:
                sent.put_nowait(None)

        task = asyncio.create_task(run())
        self._tasks.add(task)  # it outlives this generator when the client leaves, until it has cleaned up
        task.add_done_callback(self._tasks.discard)
        try:
            while (message := await sent.get()) is not None:
                yield message
        finally:
            left.set()

    async def answer_whole(self, ask: Ask) -> tuple[str, Whole]:
        """This replica's name and its answer at the end."""
        head: Message = {}
        body = b""
        async with contextlib.aclosing(self.answer(ask)) as messages:
            async for message in messages:
                head = head or message
                body += message.get("body", b"")
        return self._name, Whole(head["status"], list(head.get("headers", ())), body, self._number)

    def __del__(self) -> None:  # Ray Serve calls it when a replica is to go
        for engine in getattr(self, "_engines", {}).values():
            engine.close()


class RayFleet(Fleet):
    """Replicas behind a handle of Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._stream = handle, handle.options(stream=True)
        errors, serve_errors = require("ray.exceptions", "ray"), require("ray.serve.exceptions", "ray")
        self._lost = (errors.RayActorError, errors.WorkerCrashedError, serve_errors.DeploymentUnavailableError)

    async def ask(self, ask: Ask) -> AsyncGenerator[Message]:
        response = self._stream.answer.remote(ask)
        waiting: asyncio.Future[Message] | None = None
        try:
            while True:
                waiting = asyncio.ensure_future(anext(response))
                while not (await asyncio.wait({waiting}, timeout=PATIENCE))[0]:
                    if not await self.ask_all(
                        Ask({"type": "http", "method": "GET", "path": "/version", "headers": []})
                    ):
                        raise ReplicaLostError
                yield await waiting
        except StopAsyncIteration:
            return
        except self._lost as error:
            raise ReplicaLostError from error
        finally:
            if waiting is not None:
                waiting.cancel()
            response.cancel()  # harmless at the end

    async def ask_all(self, ask: Ask) -> dict[str, Whole]:
        try:
            response = self._handle.broadcast("answer_whole", ask)
            answers = await response.results_async(timeout_s=PATIENCE, return_exceptions=True)
        except (*self._lost, TimeoutError):
            return {}
        return dict(answer for answer in answers if not isinstance(answer, BaseException))


def affinity_router() -> type:
    """`affinity.choose_replica` as Ray Serve's way to route. It lives beside the handle, in the front's process."""
    api: Any = require("ray.serve.request_router", "ray")

    class AffinityRouter(api.RequestRouter):
        queue_len_response_deadline_s = 2.0  # a replica that computes on every core answers late and is not ill

        def initialize_state(self, **_: Any) -> None:
            self.loads: dict[str, int] = {}
            self.draw = Random()

        async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
            named = {one.replica_id.unique_id: one for one in candidate_replicas}
            if not named or pending_request is None:
                return [candidate_replicas]
            pending_request.routing_context.should_backoff = True
            ask: Ask = pending_request.args[0]
            if ask.replica in named:
                return [[named[ask.replica]]]
            chosen = choose_replica(ask.key, {name: self.loads.get(name, 0) for name in named}, self.draw)
            return [[named[chosen]], [one for name, one in named.items() if name != chosen]]

        def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
            self.loads[replica_id.unique_id] = self.loads.get(replica_id.unique_id, 0) + 1

        def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
            left = self.loads.get(replica_id.unique_id, 0) - 1
            if left > 0:
                self.loads[replica_id.unique_id] = left
            else:
                self.loads.pop(replica_id.unique_id, None)

    return AffinityRouter


@contextlib.contextmanager
def running_replicas(offer: Offer, count: int) -> Iterator[Fleet]:
    """`count` replicas on this machine, ready; a model that cannot be served is a `HanlinError`."""
    if count < 1:
        raise HanlinError(f"The number of replicas is {count}; it must be at least 1.")
    os.environ.update(PRIVATE, RAY_AUTH_TOKEN=secrets.token_hex(32))
    ray, serve = require("ray", "ray"), require("ray.serve", "ray")
    serve_config = require("ray.serve.config", "ray")
    folder = Path(tempfile.mkdtemp(prefix="hanlin-ray-"))
    problem = folder / "problem"
    cards = 0 if offer.limits.get("device") == "cpu" else _cards()
    try:
        ray.init(
            address="local",
            num_cpus=count,  # a place for each; how many threads one takes is set below
            num_gpus=cards,
            object_store_memory=OBJECT_BYTES,
            include_dashboard=False,
            log_to_driver=True,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
        )
        logs = {"log_level": "ERROR", "enable_access_log": False}
        serve.start(proxy_location="Disabled", logging_config=logs)
        deployment = serve.deployment(
            Replica,
            name="replica",
            num_replicas=count,
            max_ongoing_requests=MANY,
            max_constructor_retry_count=1,
            health_check_period_s=1,
            health_check_timeout_s=60,
            graceful_shutdown_timeout_s=5,
            graceful_shutdown_wait_loop_s=0.1,
            logging_config=logs,
            request_router_config=serve_config.RequestRouterConfig(request_router_class=affinity_router()),
            ray_actor_options={"num_cpus": 1, "num_gpus": min(1, cards / count)},
        )
        threads = max(1, (os.cpu_count() or 1) // count)
        try:
            handle = serve.run(deployment.bind(offer, threads, problem), name="hanlin", route_prefix=None)
        except RuntimeError as error:
            if problem.is_file():
                raise HanlinError(problem.read_text(encoding="utf-8")) from error
            raise
        yield RayFleet(handle)
    finally:
        with contextlib.suppress(Exception):  # what is left of it dies with the next line
            serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _cards() -> int:
    import torch

    return torch.cuda.device_count()
