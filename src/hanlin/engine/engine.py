"""`Engine`: prompts in, completions out, many at once.

    submit ─▶ Worker (one thread) ─▶ Scheduler: who computes what      tables, pages
                     │   ▲
                     ▼   │
                   Runner: one flat batch through the model            paged cache
                     │
                     ▼
                   Sampler: logits to tokens ─▶ Request: text, events

`submit` is safe from any thread, which is what the server calls. docs/engine.md follows one request through it.

    with Engine.from_folder("runs/mine/model") as engine:
        print(engine.generate("Once upon a time")[0].text)
"""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.engine.beams import BeamSearch
from hanlin.engine.constraints import Constraints
from hanlin.engine.contrastive import ContrastiveSearch
from hanlin.engine.embedding import writes
from hanlin.engine.governor import SpeculationGovernor
from hanlin.engine.handle import RequestHandle
from hanlin.engine.limits import read_limits
from hanlin.engine.memory import Memory, fingerprint, open_memory
from hanlin.engine.ngram_draft import NgramDraft
from hanlin.engine.opening import open_model
from hanlin.engine.ranks import Leader, open_ranks, refuse_alone
from hanlin.engine.request import BestOf, Deliver, Owner, Request, with_logprobs
from hanlin.engine.runner import Runner
from hanlin.engine.sampling import check_tokens
from hanlin.engine.scheduler import Scheduler
from hanlin.engine.search import Search
from hanlin.engine.speculation import DraftModel, Ngrams, OwnHeads, Proposer, Speculation
from hanlin.engine.tables import root_of
from hanlin.engine.text import Spelling
from hanlin.engine.types import Completion, EngineStats, Event, SamplingParams
from hanlin.engine.worker import Worker
from hanlin.models.transformer import Transformer
from hanlin.nn.frozen import freeze
from hanlin.parallel.tensor import local_config
from hanlin.tokens import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or chat messages


class Engine:
    """Continuous batching over one model. draft: a smaller model with the same tokens, for speculate="draft"; identity:
    tells this model's pages on disk from those of others (None: looked up in its weights); limits: those of
    `engine.limits.Limits`, by name."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        draft: Transformer | None = None,
        identity: str | None = None,
        **limits: Any,
    ) -> None:
        self.limits = read_limits(limits)
        longest = model.config.max_positions
        if (self.limits.max_context or 0) > longest:
            raise HanlinError(
                f"max_context is {self.limits.max_context}; it must be at most {longest}, the positions this model "
                "knows."
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self._writes = writes(model)
        config = model.config
        if model.part is not None:
            refuse_alone(self.limits, draft)
            config = local_config(config, model.part.ranks)
        self._memory: Memory = open_memory(model, self.limits, config=config, identity=identity)
        self.max_context = min(self.limits.max_context or longest, self._memory.capacity)
        if self.limits.max_context is not None and self.max_context < self.limits.max_context:
            raise HanlinError(
                f"max_context is {self.limits.max_context}, but the pages of cache_bytes and host_bytes hold "
                f"{self._memory.capacity} tokens. Raise one of them, or lower max_context."
            )
        self._max_open = self.limits.max_batch + self.limits.max_waiting
        self._spelling = Spelling(tokenizer)
        self._end_ids = frozenset(tokenizer.stop_ids) | _ends_of(model)
        self._made_constraints: list[Constraints] = []
        self._runner = Runner(
            model, self._memory.cache, height=self.limits.step_tokens if self.limits.pad_products else 0
        )
        scheduler = Scheduler(
            self._memory.tables,
            self._memory.tiers,
            max_batch=self.limits.max_batch,
            step_tokens=self.limits.step_tokens,
        )
        self._leader = None if model.part is None else Leader(None, self._runner)
        self._worker = Worker(
            self._leader or self._runner,
            scheduler,
            vocabulary=model.config.vocab_size,
            device=model.device,
            max_open=self._max_open,
            drafter=self._speculation(draft),
            fill_masks=lambda places, made=self._made_constraints: made[0].fill_masks(places),
        )
        self._finalizer = weakref.finalize(self, _stop, self._worker, self._memory, self._leader)  # also at exit

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str = "auto",
        device: str = "auto",
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        draft: str | os.PathLike[str] | None = None,
        ranks: int = 1,
        **limits: Any,
    ) -> "Engine":
        """The model and tokenizer of a folder. On a CPU its weights are laid out for generating (`nn.frozen`): the
        engine's model can then be neither trained nor saved.

        dtype: "float32", "bfloat16" …, or "auto": whichever decodes this model faster here (`faster_dtype`).
        adapters: LoRA adapters by name, in PEFT's files. draft: the folder of a draft model. ranks: cut the model over
        so many processes of this machine (tensor parallelism, `engine.ranks`). limits: those of the constructor.
        """
        found = read_limits(limits)  # a wrong name is said before a large file is read
        if ranks > 1:
            refuse_alone(found, draft, adapters)
            model, limits = open_ranks(path, ranks, dtype=dtype, device=device, limits=limits)
            return cls(model, Tokenizer.load(path), **limits)
        tokenizer = Tokenizer.load(path)
        model = open_model(path, dtype=dtype, device=device)
        helper = None
        if draft is not None:
            limits = {"speculate": "draft"} | limits
            helper = open_model(draft, dtype=model.dtype, device=device)
            freeze(helper)
        identity = fingerprint(model)  # freezing takes the weights away that it looks at
        freeze(model)
        engine = cls(model, tokenizer, draft=helper, identity=identity, **limits)
        for name, folder in (adapters or {}).items():
            engine.load_adapter(name, folder)
        return engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **owner: Any,
    ) -> list[Completion]:
        """All prompts together; returns n completions a prompt, in the order of the prompts.

        owner: of all of them, as `submit`. However many there are, they wait for their turn: `Busy` is for `submit`.
        Ctrl-C aborts them.
        """
        many: Sequence[Any] = prompts if _are_many(prompts) else [prompts]
        wanted = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(wanted) != len(many):
            raise HanlinError(f"There are {len(many)} prompts but {len(wanted)} SamplingParams; give one, or one each.")
        handles: list[RequestHandle] = []
        checked = [(self._prompt_ids(p), w or SamplingParams()) for p, w in zip(many, wanted, strict=True)]
        try:
            for ids, each in checked:
                handles.append(self._start(ids, each, Owner(**owner), quiet=True))
            events = [event for handle in handles for event in handle]
        except BaseException:
            for handle in handles:
                handle.abort()
            raise
        whole = [event.completion for event in events if event.completion is not None]
        ends = iter(whole)
        return [c for _, each in checked for c in sorted((next(ends) for _ in range(each.n)), key=lambda c: c.index)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **owner: Any) -> Iterator[Event]:
        """Events of one prompt as they come; closing the iterator aborts the request."""
        return iter(self.submit(prompt, params, **owner))

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        salt: str = "",
        priority: int = 0,
        client: str = "",
        on_event: Deliver | None = None,
    ) -> RequestHandle:
        """Queue a request. adapter, salt, priority, client: see `Owner`. Raises `HanlinError` for a prompt that does
        not fit, `Busy` when the queue is full."""
        owner = Owner(adapter, salt, priority, client)
        return self._start(self._prompt_ids(prompt), params or SamplingParams(), owner, on_event=on_event, bounded=True)

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> Tensor:
        """The meaning of texts as vectors: hidden states after the last norm, their mean over a text's tokens, scaled
        to length 1: (prompts, width) fp32. One text at a time, between the steps of what is being generated."""
        if self._leader is not None:
            raise HanlinError("An engine over several ranks gives no embeddings; open the model with one.")
        many: Sequence[Any] = prompts if _are_many(prompts) else [prompts]
        rows = [self._prompt_ids(prompt, writes=False) for prompt in many]
        vectors = [self._worker.between_steps(partial(self._runner.embed, ids)) for ids in rows]
        return torch.stack([vector.result() for vector in vectors])

    def load_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Read a LoRA adapter in PEFT's files; requests may then ask for it by name. Between two steps of what runs."""
        if self._leader is not None:
            raise HanlinError("An engine over several ranks takes no adapters; merge it into the model.")
        self._worker.between_steps(partial(self._runner.adapters.load, name, folder)).result()

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for it; those under way end with it."""
        self._worker.between_steps(partial(self._runner.adapters.unload, name)).result()

    def adapters(self) -> list[str]:
        """The names of those that are loaded."""
        return self._runner.adapters.names

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
        owner: Owner,
        *,
        on_event: Deliver | None = None,
        quiet: bool = False,
        bounded: bool = False,
    ) -> RequestHandle:
        sequences = params.beams if params.beams > 1 else params.copies
        if bounded and sequences > self._max_open:
            raise HanlinError(f"n is {sequences}; this engine runs and queues at most {self._max_open} sequences.")
        if not self._writes:
            raise HanlinError("This model reads and does not write: it gives embeddings, no completions.")
        check_tokens(params, self.model.config.vocab_size)
        ids, owner = self._split_source(ids, owner)
        handle = RequestHandle(self._worker.wake, params.n, on_event)
        deliver: Deliver = handle.deliver
        if params.best_of is not None and params.best_of > params.n:
            deliver, params, quiet = BestOf(params, handle.deliver), with_logprobs(params), True
        matcher = None if params.constraint is None else self._constraints.compile(params.constraint)
        adapter = None if owner.adapter is None else self._runner.adapters.find(owner.adapter)
        salt = owner.salt if owner.source is None else f"{owner.source} {owner.salt}"  # what a decoder knows of both
        root = root_of(self._memory.identity, "" if adapter is None else adapter.contents, salt)
        for index in range(1 if params.beams > 1 or params.contrast else params.copies):
            request = Request(
                ids,
                params,
                spelling=self._spelling,
                end_ids=self._end_ids,
                room=self.max_context - len(ids),
                deliver=deliver,
                owner=owner,
                quiet=quiet,
                index=index,
                leader=handle.requests[0] if index else None,
                matcher=matcher if matcher is None or not index else matcher.copy(),
            )
            request.root, request.adapter = root, adapter
            request.search = self._search(request)
            handle.requests.append(request)
        self._worker.submit(handle.requests, bounded=bounded)
        return handle

    def _speculation(self, draft: Transformer | None) -> Speculation | None:
        kind = self.limits.speculate
        if (draft is not None) != (kind == "draft"):
            raise HanlinError(f'speculate is "{kind}"; a draft model goes together with "draft", and only with that.')
        if kind == "off":
            return None
        proposer: Proposer
        if kind == "ngram":
            proposer = Ngrams(NgramDraft(most=self.limits.most_drafts))
        elif kind == "mtp":
            proposer = OwnHeads(self._runner)
        else:
            assert draft is not None
            pages = self._memory.tables.pools[0].size
            proposer = DraftModel(draft, self.model.config.vocab_size, pages=pages, page=self.limits.page_size)
        return Speculation(proposer, SpeculationGovernor(self.limits.most_drafts))

    @property
    def _constraints(self) -> Constraints:
        """Made when the first constraint comes: it reads the whole vocabulary."""
        if not self._made_constraints:
            self._made_constraints.append(Constraints(self.tokenizer, self.model.config.vocab_size, self._end_ids))
        return self._made_constraints[0]

    def _search(self, request: Request) -> Search | None:
        """What computes several sequences for this one request."""
        p = request.params
        if p.beams == 1 and not p.contrast:
            return None
        name, width = ("beams", p.beams) if p.beams > 1 else ("contrast", p.top_k)
        for other, used in [("stop", p.stop), ("constraint", p.constraint), ("logprobs", p.logprobs is not None),
                            ("prompt_logprobs", p.prompt_logprobs is not None)]:  # fmt: skip
            if used:
                raise HanlinError(f"{other} has no effect together with {name}; leave one of them out.")
        if width > min(self.limits.max_batch, self.limits.step_tokens):
            raise HanlinError(
                f"{name} needs {width} sequences at once; this engine computes {self.limits.max_batch} together, in "
                f"steps of {self.limits.step_tokens} tokens."
            )
        most = len(request.ids) + request.limit
        if not self._memory.tables.fits(most, sequences=width, step=self.limits.step_tokens):
            raise HanlinError(
                f"{name} needs pages for {width} sequences of {most} tokens, more than this engine has; raise "
                "cache_bytes, or lower max_tokens."
            )
        return BeamSearch(request) if p.beams > 1 else ContrastiveSearch(request)

    def _split_source(self, ids: list[int], owner: Owner) -> tuple[list[int], Owner]:
        """A model with an encoder reads the prompt there, and its decoder begins with a token of its own."""
        if self.model.encoder is None:
            return ids, owner
        return self._decoder_start, replace(owner, source=tuple(ids))

    def _prompt_ids(self, prompt: Prompt, *, writes: bool = True) -> list[int]:
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
        if len(ids) + writes > self.max_context:
            advice = "" if self.max_context == self.model.config.max_positions else ", or raise max_context"
            raise HanlinError(
                f"The prompt has {len(ids)} tokens; this engine's context is {self.max_context}, prompt and output "
                f"together. Shorten the prompt{advice}."
            )
        return ids

    @property
    def _decoder_start(self) -> list[int]:
        extra = self.model.config.extra
        places = [extra.get("generation_config") or {}, extra]
        start = next((p["decoder_start_token_id"] for p in places if p.get("decoder_start_token_id") is not None), None)
        if start is None:
            start = next((p["pad_token_id"] for p in places if p.get("pad_token_id") is not None), 0)
        forced = next((p["forced_bos_token_id"] for p in places if p.get("forced_bos_token_id") is not None), None)
        return [start] if forced is None else [start, forced]


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


def _stop(worker: Worker, memory: Memory, leader: Leader | None) -> None:
    worker.stop()
    if leader is not None:
        leader.stop()
    memory.tiers.close()
