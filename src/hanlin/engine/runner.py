"""One step of the model: a plan in, logits out. The only place where the engine touches the model and its pages.

A `Plan` is plain numbers, so that every rank of a tensor-parallel engine can be sent the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.engine.adapters import Adapters
from hanlin.engine.embedding import mean_pooled
from hanlin.engine.paged_cache import PagedCache
from hanlin.models.layer import Layer
from hanlin.models.shared import Shared
from hanlin.models.transformer import Transformer

Source = tuple[tuple[int, ...], str | None]  # what an encoder reads, the key of the adapter it reads it with


@dataclass(frozen=True)
class Plan:
    """One forward pass over a flat batch.

    ids: the new tokens, sequence after sequence; starts, counts, tables: of each sequence (`paged_cache.Step`); copies:
    pages that part first; wanted: indices into ids of which logits are asked for; hidden: their hidden states too;
    everything: those of all tokens. adapters: of each sequence, the key of its adapter or None. readers: of each
    sequence, the source it reads; sources: those that are new, to be encoded first; done: sources that nobody reads
    any more. wipes: pages that may hold what is no number.
    """

    ids: list[int]
    starts: list[int]
    counts: list[int]
    tables: list[list[list[int]]]
    wanted: list[int]
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    hidden: bool = False
    everything: bool = False
    adapters: list[str | None] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)
    sources: dict[int, Source] = field(default_factory=dict)
    done: list[int] = field(default_factory=list)
    wipes: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """logits (wanted, vocabulary), or None where none was; hidden (wanted, width), everything (N, width): hidden states
    where they were asked for."""

    logits: Tensor | None
    hidden: Tensor | None = None
    everything: Tensor | None = None


class Runner:
    """height: pad every product to so many tokens (0: do not), so that a token's numbers do not depend on how many
    others are computed beside it, whatever the matrix library does with products of different heights."""

    def __init__(self, model: Transformer, cache: PagedCache, *, height: int = 0) -> None:
        self.model, self.cache, self.height = model, cache, height
        self.adapters = Adapters(model)
        self.sources = Sources(model, self.adapters) if model.encoder is not None else None

    @torch.inference_mode()
    def __call__(self, plan: Plan) -> Result:
        self.cache.wipe(plan.wipes)
        self.cache.copy(plan.copies)
        padding = max(0, self.height - len(plan.ids))
        reader = None if self.sources is None else self.sources.step(plan, padding)
        self.adapters.select(plan.adapters, plan.counts)
        step = self.cache.step(plan.starts, plan.counts, plan.tables, padding=padding, source=reader)
        ids = torch.tensor([plan.ids + [0] * padding], device=self.model.device)  # (1, N)
        hidden = self.model(ids, cache=step, logits=None).hidden[0]  # (N, width)
        everything = hidden[: len(plan.ids)] if plan.everything else None
        if not plan.wanted:
            return Result(None, None, everything)
        index = plan.wanted
        if len(index) != len(hidden):
            hidden = hidden[torch.tensor(index, device=hidden.device)]  # (wanted, width)
        return Result(self._logits(hidden), hidden if plan.hidden else None, everything)

    @torch.inference_mode()
    def draft(
        self, hidden: Sequence[Tensor], starts: Sequence[int], ids: Sequence[Sequence[int]],
        tables: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[int]]:  # fmt: skip
        """What the modules for further tokens guess. For each sequence: hidden (T, width) of the tokens from starts[i]
        on that they have not read, the ids behind each of these, its pages -> guesses of what follows the last of ids.
        """
        ahead, model = self.model.ahead, self.model
        assert ahead is not None
        counts = [len(rows) for rows in hidden]
        ends = torch.tensor(counts, device=model.device).cumsum(0) - 1
        step = self.cache.step(starts, counts, tables)
        shared = Shared(step.positions, sum(counts), model.dtype, model.config.max_positions, cache=step)
        flat = torch.cat(list(hidden))[None]  # (1, N, width)
        following = [list(each) for each in ids]
        guesses: list[list[int]] = [[] for _ in counts]
        for module in ahead.steps:
            tokens = torch.tensor([[token for each in following for token in each]], device=model.device)
            flat = module(flat, model.embed(tokens), lambda layer, x: layer(x, shared))
            chosen = model.logits(flat[0, ends]).argmax(-1).tolist()
            for guess, each, token in zip(guesses, following, chosen, strict=True):
                guess.append(token)
                each[:] = [*each[1:], token]
        return guesses

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """(width,): `embedding.mean_pooled` of the model without adapters."""
        self.adapters.select([], [])
        return mean_pooled(self.model, ids)

    def _logits(self, hidden: Tensor) -> Tensor:
        if not self.height:
            return self.model.logits(hidden)
        parts = [
            self.model.logits(F.pad(part, (0, 0, 0, self.height - len(part))))[: len(part)]
            for part in hidden.split(self.height)
        ]
        return torch.cat(parts)


class Sources:
    """What the decoders of a model with an encoder read: encoded once, kept as keys and values a layer."""

    def __init__(self, model: Transformer, adapters: Adapters) -> None:
        self._model, self._adapters = model, adapters
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}  # source -> of each layer (S, kv_heads, D)

    def step(self, plan: Plan, padding: int) -> "ReadSources":
        for source in plan.done:
            self._kept.pop(source, None)
        for source, (ids, adapter) in plan.sources.items():
            self._adapters.select([adapter], [len(ids)])
            read = self._model.encode(torch.tensor([ids], device=self._model.device))
            kept = []
            for layer in self._model.model.layers:
                assert isinstance(layer, Layer) and layer.cross_attn is not None
                k, v = layer.cross_attn.keys_and_values(read)
                kept.append((k[0].contiguous(), v[0].contiguous()))
            self._kept[source] = kept
        return ReadSources([self._kept[source] for source in plan.readers], plan.counts, padding)


class ReadSources:
    """`nn.attention.CrossReader` of one step."""

    def __init__(self, kept: Sequence[list[tuple[Tensor, Tensor]]], counts: Sequence[int], padding: int) -> None:
        self._kept, self._counts, self._padding = kept, counts, padding

    def __call__(self, layer: int, q: Tensor, scale: float) -> Tensor:
        parts = q[0, : sum(self._counts)].split(list(self._counts))  # (T, heads, D) each
        out = []
        for part, kept in zip(parts, self._kept, strict=True):
            k, v = (x.transpose(0, 1)[None] for x in kept[layer])  # (1, kv_heads, S, D)
            read = F.scaled_dot_product_attention(
                part.transpose(0, 1)[None], k, v, scale=scale, enable_gqa=k.shape[1] != part.shape[1]
            )
            out.append(read[0].transpose(0, 1))
        return F.pad(torch.cat(out), (0, 0, 0, 0, 0, self._padding))[None]
