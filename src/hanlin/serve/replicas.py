"""Replicas on Ray Serve: each a process with its own engines and the application of `app.create_app` around them.

    hanlin serve MODEL --replicas 2
        front (`front.py`, this process, one address) ── Ray Serve's handle ──▶ Replica 0
                                                         AffinityRouter   └──▶ Replica 1

Ray Serve starts the replicas, watches them and replaces one that dies; its own HTTP proxy is left out, for the front
has to read a prompt before it can choose. All of it lives on this machine (`core.local_ray`).
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.types import Message

from hanlin.core.errors import HanlinError, require
from hanlin.core.local_ray import local_ray
from hanlin.serve.fleet import Ask, Fleet, ReplicaLostError, Whole, answer_of, whole_answer_of
from hanlin.serve.limits import Key

APP = "hanlin"
QUIET = {"log_level": "CRITICAL", "enable_access_log": False}  # what fails is raised, or told by the front
MANY = 4096  # requests in one replica: never reached, for the engine's own bounded queue answers 429 before
ROUTER = "hanlin.serve.ray_router.AffinityRouter"
PIECE_SECONDS = 1e-3  # of work that one piece of an answer costs on its way: a replica sends no more of them
ALIVE = Ask({"type": "http", "method": "GET", "path": "/version", "headers": [], "query_string": b""})
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

        from hanlin.engine import Engine
        from hanlin.serve.app import create_app

        torch.set_num_threads(threads)
        context = require("ray.serve", "ray").get_replica_context()
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
        self._open = 0
        keys = [replace(key, max_concurrent=None) for key in offer.keys]
        self._app = create_app(self._engines, api_key=offer.api_key, keys=keys, request_seconds=offer.request_seconds)

    async def answer(self, ask: Ask) -> AsyncGenerator[Message]:
        """The answer's messages, as they come; closed before the end, the application learns that the client left."""
        self._open += 1
        try:
            pieces = answer_of(self._app, ask, pause=lambda: self._open * PIECE_SECONDS)
            async with contextlib.aclosing(pieces) as messages:
                async for message in messages:
                    yield message
        finally:
            self._open -= 1

    async def answer_whole(self, ask: Ask) -> tuple[str, Whole]:
        """This replica's name and its answer at the end."""
        return self._name, await whole_answer_of(self._app, ask, self._number)

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
            response.cancel()  # harmless at the end
            if waiting is not None:
                waiting.cancel()
                await asyncio.wait({waiting})
                waiting.cancelled() or waiting.exception()  # seen: nobody waits for it any more

    async def ask_all(self, ask: Ask) -> dict[str, Whole]:
        try:
            response = self._handle.broadcast("answer_whole", ask)
            answers = await response.results_async(timeout_s=PATIENCE, return_exceptions=True)
        except (*self._lost, TimeoutError):
            return {}
        return dict(answer for answer in answers if not isinstance(answer, BaseException))


@contextlib.contextmanager
def running_replicas(offer: Offer, count: int) -> Generator[Fleet]:
    """`count` replicas on this machine, ready; a model that cannot be served is a `HanlinError`."""
    if count < 1:
        raise HanlinError(f"The number of replicas is {count}; it must be at least 1.")
    cards = 0 if offer.limits.get("device") == "cpu" else _cards()
    threads = max(1, (os.cpu_count() or 1) // count)
    with local_ray(cpus=count, gpus=cards) as folder:
        serve, options = require("ray.serve", "ray"), require("ray.serve.config", "ray")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config=QUIET)  # without its HTTP proxy
        deployment = serve.deployment(
            Replica,
            name="replica",
            num_replicas=count,
            max_ongoing_requests=MANY,
            max_constructor_retry_count=1,
            health_check_period_s=1,
            health_check_timeout_s=60,  # a step on every core may take long; a process that is gone is seen at once
            graceful_shutdown_timeout_s=5,
            graceful_shutdown_wait_loop_s=0.1,
            logging_config=QUIET,
            request_router_config=options.RequestRouterConfig(request_router_class=ROUTER),
            ray_actor_options={"num_cpus": 1, "num_gpus": min(1, cards / count)},
        )
        problem = folder / "problem"
        try:
            handle = serve.run(deployment.bind(offer, threads, problem), name=APP, route_prefix=None)
        except RuntimeError as error:
            if problem.is_file():
                raise HanlinError(problem.read_text(encoding="utf-8")) from error
            raise
        try:
            yield RayFleet(handle)
        finally:
            with contextlib.suppress(Exception):  # the engines close; whatever refuses to dies with Ray
                serve.delete(APP)


def _cards() -> int:
    import torch

    return torch.cuda.device_count()
