"""Keys and values in pages, and attention over them for a flat batch.

    store[group]     (pages, numbers)             a page: `page` tokens of all layers of the group, one run of bytes
    keys[layer]      (pages, kv_heads, page, D)   strided views of it; values likewise
                                                  (a latent cache, MLA, has keys only: values are their first numbers)

A page is one slice, so copying one (a fork), sending it to the host or writing it to disk is a single copy.

`step` gives the `nn.attention.Cache` of one forward pass: sequence i appends `counts[i]` tokens to the `starts[i]` that
its pages hold, and stands in the batch behind sequence i - 1, so decoding and pieces of prompts of any length mix in
one flat row. How a step attends:

- `kernels.paged_attention` writes and attends in one call a layer, wherever it can (CPU, fp32 or bf16, causal with or
  without a window);
- otherwise torch: a prompt that nothing came before is self-attention; sequences with one new token are gathered and
  padded together; the others are gathered one by one;
- a sequence that has pages on the host (`engine.tiers`) streams them through the device, a few at a time, and merges
  the parts (`nn.partial_attention`).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.engine.tables import Group, groups_of
from hanlin.kernels.paged_attention import PagedStep
from hanlin.models.config import ModelConfig
from hanlin.nn.attention import CrossReader, Scores, attend, attend_packed, plain_attention
from hanlin.nn.mask_lowering import fit, lower
from hanlin.nn.masks import Bidirectional, Causal, Mask, Window, reach
from hanlin.nn.partial_attention import attend_part, merge

PAGE = 16
STREAMED = 2048  # tokens of the host's pages that pass through the device at once


class PagedCache:
    """pages: of each group, the null page included. host_pages: of each group, in the host's memory (0: none)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        pages: Sequence[int],
        dtype: torch.dtype,
        page: int = PAGE,
        device: torch.device | str = "cpu",
        host_pages: Sequence[int] = (),
        extra_layers: int = 0,
    ) -> None:
        self.page, self.device, self.dtype = page, torch.device(device), dtype
        self.groups = groups_of(config, extra=extra_layers)
        attentions = [layer.attention for layer in (*config.layers, *[config.layers[-1]] * extra_layers)]
        self._shapes = [a.kv_shape for a in attentions]  # (kv_heads, key width, value width)
        self.group_of = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        self.store = [_zeros(n, self.numbers(g), dtype, self.device) for g, n in enumerate(pages)]
        self.keys, self.values = self._views(self.store)
        self.host_store = [_zeros(n, self.numbers(g), dtype, torch.device("cpu")) for g, n in enumerate(host_pages)]
        self.host_keys, self.host_values = self._views(self.host_store) if host_pages else ({}, {})

    def numbers(self, group: int) -> int:
        """Keys and values in a page of a group."""
        return page_numbers(self.groups[group], self._shapes, self.page)

    def page_bytes(self, group: int) -> int:
        return self.numbers(group) * self.dtype.itemsize

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """(group, from, to): pages that are about to part."""
        for group, source, target in copies:
            self.store[group][target].copy_(self.store[group][source])

    def wipe(self, pages: Sequence[tuple[int, int]]) -> None:
        """Zeros into (group, page): numbers that are not finite would survive the masks of later sequences."""
        for group, page in pages:
            self.store[group][page] = 0

    def step(
        self,
        starts: Sequence[int],
        counts: Sequence[int],
        tables: Sequence[Sequence[Sequence[int]]],
        *,
        rows: bool = False,
        padding: int = 0,
        source: CrossReader | None = None,
    ) -> "Step":
        """tables[i][group]: the pages of sequence i, which must reach to its last new token. rows: the batch is (rows,
        T) and not flat. padding: tokens at the end of the flat batch that belong to nobody."""
        return Step(self, starts, counts, tables, rows=rows, padding=padding, source=source)

    def _views(self, store: Sequence[Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        keys, values = {}, {}
        for group, numbers in zip(self.groups, store, strict=True):
            at = 0
            for layer in group.layers:
                heads, *widths = self._shapes[layer]
                for views, width in zip((keys, values), widths, strict=True):
                    size = heads * self.page * width
                    views[layer] = numbers[:, at : at + size].view(len(numbers), heads, self.page, width)
                    at += size
        return keys, values


class Step:
    """One forward pass: where its tokens go and what each may see."""

    def __init__(
        self,
        cache: PagedCache,
        starts: Sequence[int],
        counts: Sequence[int],
        tables: Sequence[Sequence[Sequence[int]]],
        *,
        rows: bool,
        padding: int,
        source: CrossReader | None,
    ) -> None:
        if rows and len(set(counts)) > 1:
            raise ValueError(f"rows of {sorted(set(counts))} tokens are no rectangle")
        self._cache, self._starts, self._counts, self._tables = cache, starts, counts, tables
        self._rows, self._padding, self.source = rows, padding, source
        flat = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        ends = np.repeat(np.add(starts, counts), counts)
        self._flat = torch.from_numpy(flat).to(cache.device)  # (N,)
        self.positions = self._shaped(flat)
        self.lengths = self._shaped(ends)
        self._offsets = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self._kernels = [
            PagedStep(starts, counts, [table[g] for table in tables], cache.page) for g in range(len(cache.groups))
        ]
        hosted = bool(cache.host_store)
        self._streams = [hosted and any(page < 0 for held in table for page in held) for table in tables]
        self._made: dict = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores, *, value_dim: int | None = None
    ) -> Tensor:
        shape, real = q.shape, len(self._flat)
        q, k = q.reshape(-1, *q.shape[2:]), k.reshape(-1, *k.shape[2:])  # (N, heads, D)
        v = None if v is None else v.reshape(-1, *v.shape[2:])
        if self._padding:
            q, k, v = q[:real], k[:real], None if v is None else v[:real]
        out = self._by_kernel(layer, q, k, v, scores, value_dim)
        if out is None:
            out = self._by_torch(layer, q, k, v, scores, value_dim)
        if self._padding:
            out = F.pad(out, (0, 0, 0, 0, 0, self._padding))
        return out.view(*shape[:3], out.shape[-1])

    def _by_kernel(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores, value_dim: int | None
    ) -> Tensor | None:
        if scores.bias is not None or any(self._streams) or (window := self._window(scores.mask)) is None:
            return None
        cache, sinks = self._cache, None if scores.sinks is None else scores.sinks.float()
        return self._kernels[cache.group_of[layer]].attend(
            q, k, v, cache.keys[layer], None if v is None else cache.values[layer],
            scale=scores.scale, window=window, softcap=scores.softcap or 0.0, sinks=sinks, value_dim=value_dim,
        )  # fmt: skip

    def _by_torch(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores, value_dim: int | None
    ) -> Tensor:
        cache, group = self._cache, self._cache.group_of[layer]
        keys = cache.keys[layer]
        where = self._once(("where", group), lambda: self._places(group))
        keys[where[0], :, where[1]] = k
        if v is None:
            values, v = keys[..., :value_dim], k[..., :value_dim]
        else:
            values = cache.values[layer]
            values[where[0], :, where[1]] = v
        out = v.new_empty(len(q), q.shape[1], v.shape[-1])
        single = [i for i, n in enumerate(self._counts) if n == 1 and not self._streams[i]]
        if len(single) > 1:
            index = self._once("single", lambda: torch.tensor([self._offsets[i] for i in single], device=q.device))
            out[index] = self._decode(single, group, q[index], keys, values, scores)
            left = [i for i in range(len(self._counts)) if i not in set(single)]
        else:
            left = list(range(len(self._counts)))
        for i in left:
            part = slice(self._offsets[i], self._offsets[i + 1])
            if self._streams[i]:
                out[part] = self._stream(i, layer, group, q[part], keys, values, scores, value_dim)
            elif self._starts[i] == 0 and self._counts[i] > 1 and scores.bias is None and scores.mask.rows == 1:
                out[part] = self._fresh(q[part], k[part], v[part], scores)
            else:
                out[part] = self._one(i, group, q[part], keys, values, scores)
        return out

    def _fresh(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """Nothing came before: the sequence's own new keys are all there is."""
        made = ("lowered", scores.mask, len(q))
        lowered = self._once(made, lambda: lower(scores.mask, len(q), dtype=q.dtype, device=q.device))
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # (1, heads, T, D)
        return attend(q, k, v, scores, lowered)[0].transpose(0, 1)

    def _one(self, i: int, group: int, q: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
        """One sequence over all it may see: q (T, heads, D) -> (T, heads, width of a value)."""
        end = self._starts[i] + self._counts[i]
        begin = self._begin(i, scores.mask)
        pages = self._once(("pages", group, i, begin), lambda: self._page_index(self._tables[i][group][begin:]))
        skip = begin * self._cache.page
        seen = [_gather(x, pages)[None, :, : end - skip] for x in (keys, values)]  # (1, kv_heads, L, D)
        hidden = self._hidden((i,), scores.mask, skip, end, q.dtype)
        q = q[None]
        if scores.plain and scores.bias is None:
            return attend_packed(q, seen[0], seen[1], hidden, scores.scale)[0]
        return self._plain((i,), q, seen[0], seen[1], hidden, skip, end, scores)[0]

    def _decode(
        self, rows: Sequence[int], group: int, q: Tensor, keys: Tensor, values: Tensor, scores: Scores
    ) -> Tensor:
        """Sequences with one new token each, padded to the longest: q (R, heads, D) -> (R, heads, width of a value)."""
        begin = min(self._begin(i, scores.mask) for i in rows)
        skip, end = begin * self._cache.page, max(self._starts[i] for i in rows) + 1

        def padded() -> Tensor:
            most = -(-end // self._cache.page)
            lines = [list(self._tables[i][group][:most]) for i in rows]
            return torch.tensor([(line + [0] * (most - len(line)))[begin:] for line in lines], device=q.device)

        table = self._once(("padded", group, begin), padded)  # (R, pages)
        seen = [_gather_rows(x, table)[:, :, : end - skip] for x in (keys, values)]  # (R, kv_heads, L, D)
        hidden = self._hidden(tuple(rows), scores.mask, skip, end, q.dtype)
        q = q[:, None]
        if scores.plain and scores.bias is None:
            return attend_packed(q, seen[0], seen[1], hidden, scores.scale)[:, 0]
        return self._plain(tuple(rows), q, seen[0], seen[1], hidden, skip, end, scores)[:, 0]

    def _plain(
        self, rows: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, skip: int, end: int,
        scores: Scores,
    ) -> Tensor:  # fmt: skip
        """Soft-cap, sinks, a position bias: q (R, T, heads, D) -> (R, T, heads, width of a value)."""
        bias = None if hidden is None else hidden[:, None]  # (R, 1, T, L)
        if scores.bias is not None:
            positions = torch.stack([self._positions_of(i) for i in rows])
            added = scores.bias(positions, torch.arange(skip, end, device=q.device)[None]).to(q.dtype)
            bias = added if bias is None else added + bias
        return plain_attention(q.transpose(1, 2), k, v, scores, bias).transpose(1, 2)

    def _stream(
        self, i: int, layer: int, group: int, q: Tensor, keys: Tensor, values: Tensor, scores: Scores,
        value_dim: int | None,
    ) -> Tensor:  # fmt: skip
        """A sequence with pages on the host: runs of pages of one tier, attended one after the other."""
        cache, table = self._cache, self._tables[i][group]
        end, most = self._starts[i] + self._counts[i], max(1, STREAMED // self._cache.page)
        by_head = q.transpose(0, 1)  # (heads, T, D)
        found: tuple[Tensor, Tensor] | None = None
        at = self._begin(i, scores.mask)
        while at * cache.page < end:
            host, stop = table[at] < 0, at + 1
            while stop < len(table) and stop - at < most and (table[stop] < 0) == host and stop * cache.page < end:
                stop += 1
            index = self._page_index([abs(page) for page in table[at:stop]]).to("cpu" if host else q.device)
            skip, last = at * cache.page, min(end, stop * cache.page)
            k = _gather(cache.host_keys[layer] if host else keys, index)[:, : last - skip].to(q.device)
            if value_dim is not None:
                v = k[..., :value_dim]
            else:
                v = _gather(cache.host_values[layer] if host else values, index)[:, : last - skip].to(q.device)
            bias = self._hidden((i,), scores.mask, skip, last, torch.float32)
            if scores.bias is not None:
                added = scores.bias(self._positions_of(i)[None], torch.arange(skip, last, device=q.device)[None])[0]
                bias = added if bias is None else added + bias
            part = attend_part(by_head, k, v, bias, scale=scores.scale, softcap=scores.softcap)
            found, at = merge(found, part), stop
        assert found is not None
        out, lse = found
        if scores.sinks is not None:  # a sink takes its share of the softmax and gives nothing
            out = out * torch.sigmoid(lse - scores.sinks.to(lse.dtype)[:, None, None])
        return out.transpose(0, 1).to(q.dtype)

    def _begin(self, i: int, mask: Mask) -> int:
        """The first page of sequence i that its new tokens may see."""
        window = reach(mask)
        return 0 if window is None else max(0, (self._starts[i] + 1 - window) // self._cache.page)

    def _hidden(self, rows: tuple[int, ...], mask: Mask, skip: int, end: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of keys `skip` … `end` - 1: (R, T, L), 0 or -inf; None where all are seen."""

        def make() -> Tensor | None:
            same = len({self._starts[i] for i in rows}) == 1
            if self._counts[rows[0]] == 1 and same and fit(mask, end, end) in (Causal(), Bidirectional()):
                return None
            index = torch.arange(skip, end, device=self._cache.device)
            # a row a sequence of the batch: a mask may say something else of each
            shown = mask.dense(self._all_positions() if mask.rows > 1 else self._stacked(rows), index)
            if mask.rows > 1:
                shown = shown[list(rows)]
            if bool(shown.all()):
                return None
            return torch.zeros(shown.shape, dtype=dtype, device=index.device).masked_fill_(~shown, float("-inf"))

        return self._once(("hidden", rows, mask, skip, end, dtype), make)

    def _stacked(self, rows: tuple[int, ...]) -> Tensor:  # (R, T)
        return torch.stack([self._positions_of(i) for i in rows])

    def _all_positions(self) -> Tensor:
        return self._stacked(tuple(range(len(self._counts))))

    def _positions_of(self, i: int) -> Tensor:
        return self._flat[self._offsets[i] : self._offsets[i + 1]]

    def _places(self, group: int) -> tuple[Tensor, Tensor]:
        """The page and the place in it of every new token: (N,), (N,)."""
        page = self._cache.page
        pages = [
            self._tables[i][group][position // page]
            for i, (start, count) in enumerate(zip(self._starts, self._counts, strict=True))
            for position in range(start, start + count)
        ]
        if min(pages) <= 0:
            raise ValueError("a new token has no page of its own on the device")
        return self._page_index(pages), self._flat % page

    def _page_index(self, pages: Sequence[int]) -> Tensor:
        return torch.tensor(list(pages), device=self._cache.device)

    def _window(self, mask: Mask) -> int | None:
        """How many keys a mask that is nothing but a causal window shows, 0 for all of them; None: another mask."""
        return self._once(("window", mask), lambda: causal_window(mask))

    def _shaped(self, flat: np.ndarray) -> Tensor:
        if self._padding:
            flat = np.concatenate([flat, np.zeros(self._padding, flat.dtype)])
        shape = (len(self._counts), -1) if self._rows else (1, -1)
        return torch.from_numpy(flat).view(shape).to(self._cache.device)

    def _once(self, key, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def causal_window(mask: Mask) -> int | None:
    """The window of a mask that is causal and nothing else, 0 for an unbounded one; None for every other mask."""
    if mask == Causal():
        return 0
    size = reach(mask)
    return size if size and mask == Causal() & Window(size) else None


def page_numbers(group: Group, shapes: Sequence[tuple[int, int, int]], page: int) -> int:
    return page * sum(shapes[layer][0] * (shapes[layer][1] + shapes[layer][2]) for layer in group.layers)


def _gather(store: Tensor, pages: Tensor) -> Tensor:
    """(pages, kv_heads, page, D) at (P,) -> (kv_heads, P * page, D)."""
    return store[pages].transpose(0, 1).flatten(1, 2)


def _gather_rows(store: Tensor, table: Tensor) -> Tensor:
    """(pages, kv_heads, page, D) at (R, P) -> (R, kv_heads, P * page, D)."""
    return store[table].transpose(1, 2).flatten(2, 3)


def _zeros(pages: int, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that a CPU only pays for when they are touched (the system hands out zero pages)."""
    if device.type != "cpu" or not pages:
        return torch.zeros(pages, numbers, dtype=dtype, device=device)
    raw = np.zeros(pages * numbers * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(pages, numbers)
