"""The thread that owns the model and the cache: take what was submitted, compute a step, deliver, again.

An error in a forward pass ends the requests of that pass, with the error as their last event, and no others; the thread
lives on. It holds no reference to the `Engine`, so that an engine nobody uses any more is collected and stops it.
"""

import threading
from collections import Counter

import torch

from hanlin.core.errors import HanlinError
from hanlin.engine.cache import ContiguousCache
from hanlin.engine.request import Request
from hanlin.engine.sampling import BROKEN, Sampler
from hanlin.engine.scheduler import Scheduler, Work
from hanlin.engine.types import Busy, EngineStats
from hanlin.models.transformer import Transformer

Samplers = dict[int, tuple[list[Request], Sampler]]  # by the first slot of their rows


class Worker:
    """max_open: requests under way and queued together; `submit` raises `Busy` past it."""

    def __init__(
        self, model: Transformer, *, max_batch: int, max_open: int, max_context: int, max_prefill_tokens: int, keep: int
    ) -> None:
        self._model, self._max_open = model, max_open
        dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
        self._cache = ContiguousCache(
            model.config, slots=max_batch + keep, capacity=max_context, dtype=dtype, device=model.device
        )
        self._scheduler = Scheduler(self._cache, max_batch=max_batch, max_prefill_tokens=max_prefill_tokens)
        self._samplers: Samplers = {}  # of the last step
        self._wake = threading.Condition()
        self._inbox: list[Request] = []
        self._open = 0
        self._closed = False
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._finished: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="hanlin-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: list[Request], *, bounded: bool = True) -> None:
        """Queue all of them or none. bounded False: however many wait already."""
        with self._wake:
            if self._closed:
                raise HanlinError("The engine is closed; it takes no more requests.")
            if bounded and self._open and self._open + len(requests) > self._max_open:
                raise Busy(
                    f"The engine is busy: {self._open} sequences run or wait, and {len(requests)} more would pass its "
                    f"limit of {self._max_open}. Try again in a moment."
                )
            self._open += len(requests)
            self._inbox += requests
            self._wake.notify()

    def wake(self) -> None:
        """A request was aborted."""
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """Abort everything and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> EngineStats:
        running = len(self._scheduler.running)
        held = sum(self._cache.held[: self._scheduler.max_batch])
        return EngineStats(
            running=running,
            waiting=max(0, self._open - running),
            cache_usage=held / (self._scheduler.max_batch * self._cache.capacity),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            finished=dict(self._finished),
        )

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._inbox or self._scheduler.running or self._scheduler.waiting):
                    self._wake.wait()
                self._scheduler.waiting += self._inbox
                self._inbox = []
                if self._closed:
                    break
            try:
                self._step()
            except Exception as error:  # a bug outside the model: nobody may wait for ever
                self._fail([*self._scheduler.running, *self._scheduler.waiting], error)
        for request in [*self._scheduler.running, *self._scheduler.waiting]:
            request.abort()
            self._settle(request)

    def _step(self) -> None:
        for request in [r for r in (*self._scheduler.running, *self._scheduler.waiting) if r.aborted]:
            request.abort()
            self._settle(request)
        for request in self._scheduler.admit():
            self._prompt_tokens += request.prompt_tokens
            self._cached_tokens += request.cached_tokens
        self._steps += 1
        samplers, self._samplers = self._samplers, {}
        for work in self._scheduler.plan():
            try:
                broken = self._compute(work, samplers)
            except Exception as error:
                self._fail(work.requests, error)
                return  # slots have moved: plan anew
            if broken:
                message = "The model's logits are not finite numbers. Its weights are damaged, or too large for this "
                self._fail(broken, HanlinError(message + "precision: try dtype float32."))
                break
        for request in [r for r in self._scheduler.running if r.finish_reason is not None]:
            self._settle(request)

    def _compute(self, work: Work, samplers: Samplers) -> list[Request]:
        """One forward pass over some requests, and their next tokens. Returns those whose logits are not finite."""
        rows = [r.ids[r.computed : r.computed + work.count] for r in work.requests]
        ids = torch.tensor(rows, device=self._model.device)  # (rows, count)
        cache = self._cache.step(work.slots, work.count)
        logits = self._model(ids, cache=cache, logits="last" if work.sample else None).logits
        for request in work.requests:
            request.computed += work.count
        if logits is None:
            return []
        requests, sampler = samplers.get(work.slots.start, (None, None))
        if sampler is None or requests != work.requests:  # other rows than in the last step
            sampler = Sampler([r.row for r in work.requests], self._model.config.vocab_size, self._model.device)
        self._samplers[work.slots.start] = (work.requests, sampler)
        broken = []
        for request, token, logprob in zip(work.requests, *sampler.choose(logits[:, -1]), strict=True):
            if token == BROKEN:
                broken.append(request)
            else:
                self._generated_tokens += 1
                request.accept(token, logprob)
        return broken

    def _fail(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            if request.finish_reason is None:
                request.fail(error)
                self._finished["error"] += 1
            self._settle(request, keep=False)

    def _settle(self, request: Request, *, keep: bool = True) -> None:
        """Free the place of a request that has ended, then tell its owner."""
        if request in self._scheduler.running:
            self._scheduler.retire(request, keep=keep)
        else:
            self._scheduler.waiting.remove(request)
        if keep:
            self._finished[request.finish_reason or "abort"] += 1
        with self._wake:
            self._open -= 1
        request.settle()
