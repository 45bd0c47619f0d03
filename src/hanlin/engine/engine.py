"""`Engine`: prompts in, completions out, many at once.

The scheduler knows no phases: a request has tokens and how many of them are computed; each step computes some of what
is missing and samples for those that have caught up. One worker thread owns the model and the cache; `submit` is safe
from any thread, which is what the server calls. Later a paged cache and speculation slot in behind this face.

    with Engine.from_folder("runs/mine/model") as engine:
        print(engine.generate("Once upon a time")[0].text)
"""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hanlin.core.device import choose_device, choose_dtype
from hanlin.core.errors import HanlinError
from hanlin.engine.request import Deliver, Request, RequestHandle
from hanlin.engine.text import Spelling
from hanlin.engine.types import Completion, EngineStats, Event, SamplingParams
from hanlin.engine.worker import Worker
from hanlin.models.folder import load_model
from hanlin.models.transformer import Transformer
from hanlin.nn.frozen import freeze
from hanlin.tokens import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or chat messages


class Engine:
    """Continuous batching over one model.

    max_batch: sequences computed together; max_waiting: requests that may queue beyond them (`submit` raises `Busy`
    past that); max_context: tokens a sequence may hold, prompt and output (default: the model's); max_prefill_tokens:
    prompt tokens computed in one step, so that a long prompt does not stall the others; keep_prefixes: how many ended
    sequences stay in the cache, so that a prompt that begins like one of them is not computed again.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        max_waiting: int = 256,
        max_context: int | None = None,
        max_prefill_tokens: int = 2048,
        keep_prefixes: int = 4,
    ) -> None:
        longest = model.config.max_positions
        limits = [
            ("max_batch", max_batch, 1, None),
            ("max_waiting", max_waiting, 0, None),
            ("max_context", max_context or longest, 2, longest),
            ("max_prefill_tokens", max_prefill_tokens, 1, None),
            ("keep_prefixes", keep_prefixes, 0, None),
        ]
        for name, found, least, most in limits:
            if found < least or (most is not None and found > most):
                upper = "" if most is None else f" and at most {most}, the positions this model knows"
                raise HanlinError(f"{name} is {found}; it must be at least {least}{upper}.")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_context = max_context or longest
        self._max_open = max_batch + max_waiting
        self._spelling = Spelling(tokenizer)
        self._end_ids = frozenset(tokenizer.stop_ids) | _ends_of(model)
        self._worker = Worker(
            model,
            max_batch=max_batch,
            max_open=self._max_open,
            max_context=self.max_context,
            max_prefill_tokens=max_prefill_tokens,
            keep=keep_prefixes,
        )
        self._finalizer = weakref.finalize(self, self._worker.stop)  # also when the interpreter ends

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", device: str = "auto", **limits: int
    ) -> "Engine":
        """The model and tokenizer of a folder. On a CPU its weights are laid out for generating (`nn.frozen`): the
        engine's model can then be neither trained nor saved.

        dtype: "float32", "bfloat16" …, or "auto": whichever decodes this model faster here (`faster_dtype`).
        limits: those of the constructor.
        """
        if isinstance(dtype, str) and dtype != "auto":
            if dtype not in DTYPES:
                raise HanlinError(f"Unknown dtype `{dtype}`; it is one of: auto, {', '.join(DTYPES)}.")
            dtype = DTYPES[dtype]
        target = choose_device(device)
        tokenizer = Tokenizer.load(path)
        if isinstance(dtype, torch.dtype):
            model = load_model(path, dtype=dtype, device=target)
        else:
            model = load_model(path, device=target)
            model = model.to(faster_dtype(model))
        freeze(model)
        return cls(model, tokenizer, **limits)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """All prompts together; returns n completions a prompt, in the order of the prompts.

        However many there are, they wait for their turn: `Busy` is for `submit`. Ctrl-C aborts them.
        """
        many: Sequence[Any] = prompts if _are_many(prompts) else [prompts]
        wanted = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(wanted) != len(many):
            raise HanlinError(f"There are {len(many)} prompts but {len(wanted)} SamplingParams; give one, or one each.")
        handles: list[RequestHandle] = []
        checked = [(self._prompt_ids(p), w or SamplingParams()) for p, w in zip(many, wanted, strict=True)]
        try:
            for ids, each in checked:
                handles.append(self._start(ids, each, quiet=True))
            events = [event for handle in handles for event in handle]
        except BaseException:
            for handle in handles:
                handle.abort()
            raise
        whole = [event.completion for event in events if event.completion is not None]
        ends = iter(whole)
        return [c for _, each in checked for c in sorted((next(ends) for _ in range(each.n)), key=lambda c: c.index)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Event]:
        """Events of one prompt as they come; closing the iterator aborts the request."""
        return iter(self.submit(prompt, params))

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, on_event: Deliver | None = None
    ) -> RequestHandle:
        """Queue a request. Raises `HanlinError` for a prompt that does not fit, `Busy` when the queue is full."""
        return self._start(self._prompt_ids(prompt), params or SamplingParams(), on_event=on_event, bounded=True)

    def stats(self) -> EngineStats:
        """What runs and waits now, and totals since the start."""
        return self._worker.stats()

    def close(self) -> None:
        """Abort what runs and stop the worker."""
        self._finalizer()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(
        self,
        ids: list[int],
        params: SamplingParams,
        *,
        on_event: Deliver | None = None,
        quiet: bool = False,
        bounded: bool = False,
    ) -> RequestHandle:
        if bounded and params.n > self._max_open:
            raise HanlinError(f"n is {params.n}; this engine runs and queues at most {self._max_open} sequences.")
        handle = RequestHandle(self._worker.wake, on_event)
        for index in range(params.n):
            request = Request(
                ids,
                params,
                spelling=self._spelling,
                end_ids=self._end_ids,
                room=self.max_context - len(ids),
                deliver=handle.deliver,
                quiet=quiet,
                index=index,
                leader=handle.requests[0] if index else None,
            )
            handle.requests.append(request)
        self._worker.submit(handle.requests, bounded=bounded)
        return handle

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        """Text, ids or messages as checked token ids."""
        messages = [part for part in prompt if isinstance(part, Mapping)]
        if isinstance(prompt, str):
            ids = self.tokenizer.prompt(prompt)
        elif messages:
            ids = self.tokenizer.chat(messages)
        else:
            ids = [part for part in prompt if isinstance(part, int)]
        if not ids:
            raise HanlinError("The prompt is empty. Give at least one token to continue.")
        if not isinstance(prompt, str) and len(prompt) != len(messages or ids):
            raise HanlinError("A prompt is text, a list of token ids, or a list of messages; this one is a mixture.")
        size = self.model.config.vocab_size
        if wrong := [token for token in ids if not 0 <= token < size]:
            raise HanlinError(f"The prompt has the token {wrong[0]}; this model's ids go from 0 to {size - 1}.")
        if len(ids) >= self.max_context:
            advice = "" if self.max_context == self.model.config.max_positions else ", or raise max_context"
            raise HanlinError(
                f"The prompt has {len(ids)} tokens; this engine's context is {self.max_context}, prompt and output "
                f"together. Shorten the prompt{advice}."
            )
        return ids


SMALL = 6_000_000  # parameters
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def faster_dtype(model: Transformer) -> torch.dtype:
    """bf16 where the device is fast in it (CPU: measured), but fp32 for a small model on a CPU.

    bf16 reads half the bytes and pays a little for every operation. One Zen core, time of a decode step in bf16 over
    fp32, for 1 and 8 rows: 1.1M parameters 1.03, 0.99; 3.1M 0.91, 0.86; 10M 0.82, 0.82; 29M and 88M 0.70, 0.65 both.
    Below 6M the gain is not worth the rounding.
    It is a rule and no race at each start, because the same seed has to draw the same tokens tomorrow.
    """
    if model.device.type == "cpu" and model.parameter_count() < SMALL:
        return torch.float32
    return choose_dtype("auto", model.device)


def _are_many(prompts: Any) -> bool:
    """A list of prompts, not one prompt that is a list (of ids, of messages)."""
    return not isinstance(prompts, str) and not (len(prompts) and isinstance(prompts[0], int | Mapping))


def _ends_of(model: Transformer) -> frozenset[int]:
    """The end tokens that the model's own files name."""
    extra = model.config.extra
    found: set[int] = set()
    for place in (extra, extra.get("generation_config") or {}):
        ends = place.get("eos_token_id")
        found |= set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
    return frozenset(found)
