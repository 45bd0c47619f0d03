"""`RayRollout`: answers from several engines, each in a process of its own over its own copy of the weights (Ray).

    trainer ── refresh: the weights, once into shared memory ──▶ Writer 0 ┐ each copies them in when it comes to it
            ── begin: a share of the prompts to each ──────────▶ Writer 1 ┘
            ◀── answers, with the version that wrote them ──────────────────

A writer does what it is told in order, so answers that were begun are finished with the weights that they were begun
with, whatever the trainer does meanwhile; `Experience` bounds how old they may be when they are learnt. A prompt's seed
does not depend on who answers it: any number of writers gives the answers of `LocalRollout`.

A writer that dies costs what it was writing and nothing else: another process takes its place, gets the newest weights
and is asked again. Ray runs on this machine alone (`core.local_ray`), from the making of a rollout to its `close`.
"""

import os
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hanlin.align.rollout import AGAIN, Pending, Turns, fill, plain_weights, prompt_seeds, write_turns
from hanlin.align.samples import Prompt, Sample
from hanlin.core.errors import HanlinError, require
from hanlin.core.local_ray import local_ray
from hanlin.core.progress import say
from hanlin.engine import Engine, SamplingParams
from hanlin.models.config import ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.frozen import freeze
from hanlin.tokens import Tokenizer

TRIES = 3  # processes that may die over the same prompts: then it is no accident


@dataclass(frozen=True)
class Plan:
    """What a writer is made of. packed: the dtype of weights laid out for reading (`nn.frozen`), None: as they come;
    compute: of the activations, None: the weights'."""

    config: ModelConfig
    tokenizer: Tokenizer
    limits: Mapping[str, Any]
    packed: torch.dtype | None
    turns: Turns | None
    threads: int
    device: str


class Writer:
    """One process: an engine over weights that are sent to it. Ray makes it an actor."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(plan.threads)
        self._plan, self._version, self._renewed = plan, -1, 0
        self._model: Transformer | None = None
        self._engine: Engine | None = None
        self._problem = ""

    def pid(self) -> int:
        return os.getpid()

    def refresh(self, sent: Mapping[str, Any], compute: torch.dtype | None, version: int) -> None:
        """Take the weights that `sendable` made ready; what is wrong with them or the limits is said by `write`."""
        try:
            self._take({name: received(*value) for name, value in sent.items()}, compute)
            self._version, self._renewed = version, self._renewed + 1
        except HanlinError as error:
            self._problem = str(error)

    def _take(self, weights: Mapping[str, Tensor], compute: torch.dtype | None) -> None:
        plan = self._plan
        if self._engine is None or plan.packed is not None:
            if self._engine is not None:
                self._engine.close()
            dtype = plan.packed or next(iter(weights.values())).dtype
            self._model = Transformer(plan.config).to(device=plan.device, dtype=dtype).eval()
            fill(self._model, weights)
            if plan.packed is not None:
                freeze(self._model)
            else:
                self._model.compute_dtype = compute
            self._engine = Engine(self._model, plan.tokenizer, **plan.limits)
        else:
            assert self._model is not None
            fill(self._model, weights)

    def write(
        self, prompts: list[Prompt], params: SamplingParams, copies: int, seeds: list[int], seed: int, version: int
    ) -> list[Sample]:
        """`Rollout.write` for a share of the prompts, with weights of exactly this version."""
        if self._engine is None or self._version != version:
            found = f"A writer has version {self._version} of the weights and is asked for {version}."
            raise HanlinError(self._problem or found)
        return write_turns(
            self._engine, self._plan.tokenizer, prompts, params, copies=copies, seed=seed, version=version,
            salt=f"weights {self._renewed}", turns=self._plan.turns, seeds=seeds,
        )  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """What one round, or a draw of it, asks for."""

    prompts: list[Prompt]
    seeds: list[int]
    params: SamplingParams
    copies: int
    seed: int


@dataclass
class Part:
    """Prompts [start, stop) at the writer of a place. writer: who was asked; answers: Ray's promise of them."""

    start: int
    stop: int
    place: int
    writer: Any = None
    answers: Any = None


class RayRollout:
    """A `Rollout` of `actors` processes on this machine. threads: of each; device: where they compute; packed, turns,
    limits: as in `LocalRollout`. lost: answers that died with their process and were asked for again; folder: of Ray's
    own files, gone after `close`."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        actors: int,
        threads: int | None = None,
        device: str = "cpu",
        packed: torch.dtype | None = None,
        turns: Turns | None = None,
        **limits: Any,
    ) -> None:
        if actors < 1:
            raise HanlinError(f"The number of rollout actors is {actors}; it must be at least 1.")
        self.model, self.version, self.lost = model, -1, 0
        cards = torch.cuda.device_count() if torch.device(device).type == "cuda" else 0
        threads = threads or max(1, (os.cpu_count() or 1) // actors)
        plan = Plan(model.config, tokenizer, limits, packed, turns, threads, device)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self._running = ExitStack()
        self._ended = weakref.finalize(self, self._running.close)  # also at exit
        self.folder = self._running.enter_context(local_ray(cpus=actors, gpus=cards, object_bytes=3 * size, quiet=True))
        self._ray, self._errors = require("ray", "ray"), require("ray.exceptions", "ray")
        kind = self._ray.remote(num_cpus=1, num_gpus=min(1, cards / actors), max_restarts=0)(Writer)
        self._start = lambda: kind.remote(plan)
        self._writers = [self._start() for _ in range(actors)]
        self._weights: Any = None
        self._compute: torch.dtype | None = None
        try:
            self.pids()
        except self._errors.RayActorError as error:
            self.close()
            raise HanlinError(f"A rollout actor could not start: {error}") from error

    def pids(self) -> list[int]:
        """Of the writers' processes."""
        return self._ray.get([writer.pid.remote() for writer in self._writers])

    def refresh(self, version: int) -> float:
        """Send the weights as they are now; writers take them after what they are writing. Seconds of this process."""
        start = time.perf_counter()
        sent = {name: sendable(tensor) for name, tensor in plain_weights(self.model).items()}
        self._weights, self._compute, self.version = self._ray.put(sent), self.model.compute_dtype, version
        for writer in self._writers:
            self._give_weights(writer)
        return time.perf_counter() - start

    def begin(self, prompts: Sequence[Prompt], params: SamplingParams, *, copies: int, seed: int) -> Pending:
        if self._weights is None:
            raise HanlinError("A rollout answers after its first `refresh`.")
        asked = Questions(list(prompts), prompt_seeds(prompts, seed), params, copies, seed)
        n, count = len(asked.prompts), len(self._writers)
        cuts = [place * n // count for place in range(count + 1)]
        parts = [Part(cuts[i], cuts[i + 1], i) for i in range(count) if cuts[i] < cuts[i + 1]]
        for part in parts:
            self._ask(part, asked)
        return lambda: [sample for part in parts for sample in self._collect(part, asked)]

    def write(self, prompts: Sequence[Prompt], params: SamplingParams, *, copies: int, seed: int) -> list[Sample]:
        return self.begin(prompts, params, copies=copies, seed=seed)()

    def close(self) -> None:
        """End the writers and Ray with them."""
        self._writers = []
        self._ended()

    def _give_weights(self, writer: Any) -> None:
        writer.refresh.remote(self._weights, self._compute, self.version)

    def _ask(self, part: Part, asked: Questions) -> None:
        own = slice(part.start, part.stop)
        part.writer = self._writers[part.place]
        part.answers = part.writer.write.remote(
            asked.prompts[own], asked.params, asked.copies, asked.seeds[own], asked.seed, self.version
        )

    def _collect(self, part: Part, asked: Questions) -> list[Sample]:
        """The answers of a part; its prompts are asked again as often as a process dies over them."""
        for died in range(TRIES):
            try:
                samples = self._ray.get(part.answers)
            except (
                self._errors.RayActorError,
                self._errors.WorkerCrashedError,
                self._errors.OutOfMemoryError,
            ) as error:
                self._replace(part, asked, died + 1, error)
                continue
            except self._errors.RayTaskError as error:
                if isinstance(error.cause, HanlinError):
                    raise HanlinError(str(error.cause)) from None
                raise
            again = {AGAIN: died} if died else {}
            return [replace(s, group=part.start + s.group, notes={**s.notes, **again}) for s in samples]
        raise HanlinError(
            f"{TRIES} rollout actors, one after another, died over the same {part.stop - part.start} prompts. The "
            "memory of this machine may be too small for so many copies of the model: take fewer actors."
        )

    def _replace(self, part: Part, asked: Questions, died: int, error: Exception) -> None:
        """A new process at the place of a dead one, unless another part has put one there already; ask it."""
        if self._writers[part.place] is part.writer:
            self._writers[part.place] = self._start()
            self._give_weights(self._writers[part.place])
        prompts = part.stop - part.start
        self.lost += prompts * asked.copies
        say(
            f"rollout actor {part.place} died with {prompts * asked.copies} answers to {prompts} prompts under way "
            f"({type(error).__name__}); a new one is asked for them again, with version {self.version} of the weights."
        )
        if died < TRIES:
            self._ask(part, asked)


def sendable(tensor: Tensor) -> tuple[Any, torch.dtype, tuple[int, ...]]:
    """Its bytes, dtype and shape: numpy knows no bf16."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape)


def received(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The way back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the memory is shared and read-only: it is only read
        return torch.from_numpy(data).view(dtype).reshape(shape)
