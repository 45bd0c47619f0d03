"""Attention of a step of the engine over pages of keys and values (`native/paged_attention.cpp`).

    softmax(softcap(scale * q k^T)) v      for every new token, over all that its sequence holds, or the last `window`

The new tokens of all sequences stand one behind the other, a prompt beside single tokens: no phases, no padding. A
token's result depends on its own sequence alone, to the last bit: not on the batch, nor on how a prompt is cut into
steps, nor on the threads. `paged_twin` is the same in plain torch for every device and dtype.

By measurement (one core with AVX-512 and AMX, 12/4 heads of 64 and 16/8 of 128): against gathering the pages for SDPA,
pieces of prompts of 256–2,048 tokens over 0–2,048 earlier ones take 0.5–0.85 of its time in bf16, 0.6–1.0 in fp32.
Against one contiguous cache, single tokens take 0.35–0.85 of the time in bf16 and as long in fp32, where the memory
decides (0.7–1.3). Matrix tiles pay even for one token: they read keys where they are, as the left-hand side, and an
output's bits do not depend on which side it came from, so decoding and prompts agree. What had cost most before: lanes
that were added up one score at a time, e^x to more digits than bf16 holds, and accumulators that the compiler kept in
memory because one loop over them was not unrolled.
"""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from hanlin.kernels.library import INTEGER, POINTER, REAL, function

GRANULE = 16  # keys that are read together: they must stand in one page


class Layer(ctypes.Structure):
    """As in native/paged_attention.cpp."""

    _fields_ = [
        *((name, POINTER) for name in ("sequences", "pages")),
        *((name, INTEGER) for name in ("count", "page", "heads", "kv_heads", "width", "value_width")),
        *((name, INTEGER) for name in ("value_step", "keys_page", "values_page", "window")),
        *((name, REAL) for name in ("scale", "softcap")),
    ]


class PagedStep:
    """One forward pass over a flat batch: sequence i appends `counts[i]` tokens to the `starts[i]` it holds.

    tables[i][j]: the page that holds its tokens j * page … (j + 1) * page - 1; 0 where that page lies behind every
    window and was freed. Tables may be longer than what is held; arrays of C ints are copied ten times as fast as
    lists. Raises `ValueError` where a table is too short.
    """

    def __init__(
        self, starts: Sequence[int], counts: Sequence[int], tables: Sequence[Sequence[int]], page: int
    ) -> None:
        self.starts, self.counts, self.tables, self.page = starts, counts, tables, page
        described, pages, token = array("i"), array("i"), 0
        for start, count, table in zip(starts, counts, tables, strict=True):
            if start + count > len(table) * page:
                raise ValueError(f"{len(table)} pages of {page} do not hold {start + count} tokens")
            described.extend((start, count, token, len(pages)))
            pages.extend(table)
            token += count
        self.tokens = token
        self._described, self._pages = described, pages  # what the layers' descriptions point at
        # by torch: Python's own max takes 75 us for 32 sequences of 2,000 tokens
        ends = torch.frombuffer(pages, dtype=torch.int32).aminmax() if pages else (0, 0)
        self._lowest, self._highest = int(ends[0]), int(ends[1])
        self._layers: dict[tuple, tuple[Layer, int]] = {}  # and their addresses

    def write(self, k: Tensor, v: Tensor | None, keys: Tensor, values: Tensor | None) -> bool:
        """Put k (N, kv_heads, D) and v (N, kv_heads, Dv) into keys (pages, kv_heads, page, D) and values.

        False, and nothing written, where the kernel cannot do it."""
        run = function("paged_write", k.dtype)
        layer = self._layer(k, k, v, keys, values, 1.0, 0, 0.0, None)
        if run is None or layer is None:
            return False
        run(
            layer, k.data_ptr(), k.stride(0),
            None if v is None else v.data_ptr(), 0 if v is None else v.stride(0),
            keys.data_ptr(), None if values is None else values.data_ptr(),
        )  # fmt: skip
        return True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor | None, keys: Tensor, values: Tensor | None, *,
        scale: float, window: int, softcap: float = 0.0, sinks: Tensor | None = None, lse: Tensor | None = None,
        value_dim: int | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Write k (N, kv_heads, D) and v (N, kv_heads, Dv) into keys (pages, kv_heads, page, D) and values, and let
        q (N, heads, D) attend: position p sees the keys 0 … p, or with a window w the keys p - w + 1 … p.

        v and values None: the values are the first `value_dim` numbers of the keys (MLA). softcap c > 0: scores become
        c * tanh(s / c). sinks (heads,) fp32: a logit that joins the softmax and gives nothing. lse (N, heads) fp32: is
        filled with the logarithm of each sum of exponentials, the sink's among them. Returns (N, heads, Dv), or None,
        and nothing written, where the kernel cannot do it."""
        run = function("paged_attend", q.dtype)
        layer = self._layer(q, k, v, keys, values, scale, window, softcap, value_dim)
        if run is None or layer is None or scale <= 0 or not (_is_plain(sinks) and _is_plain(lse)):
            return None
        width = v.shape[2] if v is not None else value_dim or q.shape[2]
        out = q.new_empty((self.tokens, q.shape[1], width))
        run(
            layer, q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0),
            None if v is None else v.data_ptr(), 0 if v is None else v.stride(0),
            keys.data_ptr(), keys.data_ptr() if values is None else values.data_ptr(),
            None if sinks is None else sinks.data_ptr(), None if lse is None else lse.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def _layer(
        self, q: Tensor, k: Tensor, v: Tensor | None, keys: Tensor, values: Tensor | None,
        scale: float, window: int, softcap: float, value_dim: int | None,
    ) -> int | None:  # fmt: skip
        """The address of a layer's description; None where the kernel cannot read these tensors."""
        tokens, heads, width = q.shape
        strides = keys.stride()
        _, kv_heads, page, _ = keys.shape
        if not (
            q.is_cpu
            and q.dtype == k.dtype == keys.dtype
            and (v is None) == (values is None)
            and page == self.page
            and page % GRANULE == 0
            and self._lowest >= 0
            and strides[1:] == (page * width, width, 1)
            and _is_packed(q, width)
            and _is_packed(k, width)
        ):
            return None
        value_width, value_step, values_page = value_dim or width, width, strides[0]
        if v is not None and values is not None:
            value_width = value_step = v.shape[2]
            values_page = values.stride(0)
            if not (
                v.dtype == values.dtype == q.dtype
                and values.stride()[1:] == (page * value_width, value_width, 1)
                and _is_packed(v, value_width)
            ):
                return None
        shape = (
            tokens, heads, kv_heads, width, value_width, value_step, strides[0], values_page, window, scale, softcap,
        )  # fmt: skip
        if shape not in self._layers:
            if tokens != self.tokens or self._highest >= len(keys):
                raise ValueError(
                    f"{tokens} tokens, pages up to {self._highest} of {len(keys)}: the step has {self.tokens} tokens"
                )
            addresses = (x.buffer_info()[0] for x in (self._described, self._pages))
            layer = Layer(*addresses, len(self.starts), page, *shape[1:])
            self._layers[shape] = layer, ctypes.addressof(layer)
        return self._layers[shape][1]


def paged_twin(
    step: PagedStep, q: Tensor, k: Tensor, v: Tensor | None, keys: Tensor, values: Tensor | None, *,
    scale: float, window: int, softcap: float = 0.0, sinks: Tensor | None = None, lse: Tensor | None = None,
    value_dim: int | None = None,
) -> Tensor:  # fmt: skip
    """What `step.attend` computes and writes, a sequence at a time, on any device and in any dtype (sums in fp32, or in
    fp64 where the queries are)."""
    if values is None:
        values = keys[..., :value_dim]
    else:
        paged_write_twin(step, v, values)
    paged_write_twin(step, k, keys)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // keys.shape[1]
    out, first = q.new_empty((*q.shape[:2], values.shape[3])), 0
    for start, count, table in zip(step.starts, step.counts, step.tables, strict=True):
        if count == 0:
            continue
        end, here = start + count, slice(first, first + count)
        begin = max(0, start + 1 - window) if window else 0
        pages = torch.tensor(list(table[begin // step.page : -(-end // step.page)]), device=q.device)
        skip = begin % step.page
        seen = [
            x[pages].transpose(1, 2).flatten(0, 1)[skip : skip + end - begin].to(exact).repeat_interleave(group, 1)
            for x in (keys, values)
        ]  # (seen, heads, D)
        scores = torch.einsum("qhd,khd->hqk", q[here].to(exact), seen[0]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(start, end, device=q.device)[:, None]
        key = torch.arange(begin, end, device=q.device)
        hidden = (key > position) | (key <= position - window) if window else key > position
        scores = scores.masked_fill(hidden, float("-inf"))
        total = scores.logsumexp(-1)  # (heads, count)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(exact)[:, None])
        out[here] = torch.einsum("hqk,khd->qhd", (scores - total[..., None]).exp(), seen[1]).to(q.dtype)
        if lse is not None:
            lse[here] = total.T
        first += count
    return out


def paged_write_twin(step: PagedStep, new: Tensor | None, store: Tensor) -> None:
    """store (pages, kv_heads, page, D) <- new (N, kv_heads, D)."""
    if new is None:
        return
    places = [
        (table[at // step.page], at % step.page)
        for start, count, table in zip(step.starts, step.counts, step.tables, strict=True)
        for at in range(start, start + count)
    ]
    page, place = torch.tensor(places, dtype=torch.int64, device=store.device).reshape(-1, 2).unbind(1)
    store[page, :, place] = new.to(store.dtype)


def _is_packed(x: Tensor, width: int) -> bool:
    """Whether the heads of (N, heads, width) stand one behind the other."""
    return x.shape[2] == width and x.stride(2) == 1 and (x.stride(1) == width or x.shape[1] == 1)


def _is_plain(x: Tensor | None) -> bool:
    return x is None or (x.dtype == torch.float32 and x.is_cpu and x.is_contiguous())
