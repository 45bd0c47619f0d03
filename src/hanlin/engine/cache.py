"""Keys and values of running sequences in one contiguous tensor a layer.

    keys, values: (slots, kv_heads, room, width)      slot = one sequence; lengths (slots,) = tokens held

A latent cache (MLA) has no values of its own: they are the first numbers of its keys.

`step` gives the `nn.attention.Cache` of one forward pass over some slots. Running sequences are kept in the first slots
(`move`), so that a decode step attends over a strided view and copies nothing. The paged cache will stand behind the
same calls.

How a step attends, by measurement (fp32 and bf16, 1–8 rows, 64–2,000 keys, one core): a prompt that nothing came
before is self-attention; one new token a row goes to `kernels.attention`, which writes and attends in one call of 10 us
where SDPA alone took 23; otherwise it is one call of SDPA in which the query heads of a key head are rows of one tile,
so that keys are read once. For one new token in bf16 plain grouped heads took 4–10 times as long, two products and a
softmax up to 2.6 times. A mask costs under 5 %.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.kernels.attention import DecodeStep
from hanlin.models.config import ModelConfig
from hanlin.nn.attention import Cache, Scores, attend, attend_packed, plain_attention
from hanlin.nn.mask_lowering import Lowered, fit, lower
from hanlin.nn.masks import Bidirectional, Causal, Mask, Window, reach

CHUNK = 256  # room is allocated in multiples of this many tokens


class ContiguousCache:
    """Room for `slots` sequences of up to `capacity` tokens; memory is taken as the longest sequence grows."""

    def __init__(
        self, config: ModelConfig, *, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.slots, self.capacity = slots, capacity
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.held = [0] * slots  # `lengths` again, where reading it never waits for the device
        self._shapes = [layer.attention.kv_shape for layer in config.layers]  # (kv_heads, key width, value width)
        self._dtype = dtype
        self.room = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._make_room(1)

    def step(self, slots: Sequence[int], new: int) -> Cache:
        """The cache of one forward pass that appends `new` tokens to each of `slots`.

        Lengths advance when the step is made; a forward that failed is undone with `truncate`.
        """
        longest = max(self.held[slot] for slot in slots) + new
        if longest > self.capacity:
            raise ValueError(f"{longest} tokens do not fit into a cache of {self.capacity} a sequence")
        self._make_room(longest)
        return _Step(self, slots, new)

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything of a slot past `length` tokens (0 frees it)."""
        if not 0 <= length <= self.held[slot]:
            raise ValueError(f"slot {slot} holds {self.held[slot]} tokens, not {length}")
        self.held[slot] = length
        self.lengths[slot] = length

    def move(self, source: int, target: int, length: int | None = None) -> None:
        """Copy a sequence, or its first `length` tokens, to another slot."""
        length = self.held[source] if length is None else length
        if length > self.held[source]:
            raise ValueError(f"slot {source} holds {self.held[source]} tokens, not {length}")
        if source != target:
            for tensor in (*self.keys, *self.values):
                tensor[target, :, :length] = tensor[source, :, :length]
        self.held[target] = length
        self.lengths[target] = length

    def wipe(self, slot: int) -> None:
        """Forget a slot that may hold numbers that are not finite: they would survive the masks of later sequences."""
        for tensor in (*self.keys, *self.values):
            tensor[slot] = 0
        self.truncate(slot, 0)

    def _make_room(self, length: int) -> None:
        if length <= self.room:
            return
        grown = max(length, 2 * self.room)  # doubling: each token is moved less than twice on average
        room = min(-(-grown // CHUNK) * CHUNK, self.capacity)
        used, kept = max((s + 1 for s, n in enumerate(self.held) if n), default=0), max(self.held)
        for which, tensors in ((1, self.keys), (2, self.values)):
            for layer, shape in enumerate(self._shapes):
                # zeros: what lies past a row's end is masked, but a NaN left in memory would survive the mask
                larger = torch.zeros(
                    self.slots, shape[0], room, shape[which], dtype=self._dtype, device=self.lengths.device
                )
                if used:
                    larger[:used, :, :kept] = tensors[layer][:used, :, :kept]
                if self.room:
                    tensors[layer] = larger
                else:
                    tensors.append(larger)
        self.room = room


class _Step:
    """One forward pass: where its tokens go, and what each row may see."""

    def __init__(self, cache: ContiguousCache, slots: Sequence[int], new: int) -> None:
        self._cache, self._new = cache, new
        starts = [cache.held[slot] for slot in slots]
        first, rows = slots[0], len(slots)
        # consecutive slots are a view; others are gathered (a copy of their keys in every layer)
        in_a_row = all(slot == first + i for i, slot in enumerate(slots))
        self._rows = slice(first, first + rows) if in_a_row else torch.tensor(list(slots), device=cache.lengths.device)
        self._low, self._high = min(starts), max(starts)
        before = cache.lengths[self._rows][:, None]  # (rows, 1)
        if new == 1:
            self.positions = before.clone()
        else:
            self.positions = before + torch.arange(new, device=before.device)  # (rows, T)
        self._level = self._low == self._high  # all rows at the same position: plain slices, fewer masks
        cache.lengths[self._rows] += new
        for slot in slots:
            cache.held[slot] += new
        self._biases: dict[Mask, tuple[int, Tensor | None]] = {}
        self._lowered: dict[Mask, Lowered] = {}
        self._places: dict[int, Tensor] = {}
        self._windows: dict[Mask, int | None] = {}
        self._decode = DecodeStep(starts, first) if in_a_row and new == 1 else None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores, *, value_dim: int | None = None
    ) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        plain = scores.plain and scores.bias is None
        if self._decode is not None and plain and v is not None and (window := self._window(scores.mask)) is not None:
            out = self._decode.attend(q, k, v, keys, values, scale=scores.scale, window=window)
            if out is not None:
                return out
        self._write(keys, k)
        if v is None:
            values, v = keys[..., :value_dim], k[..., :value_dim]
        else:
            self._write(values, v)
        if plain and self._high == 0 and self._new > 1:
            return self._attend_fresh(q, k, v, scores)
        end = self._high + self._new
        begin, hidden = self._hidden(scores.mask, end, q.dtype)
        seen_k, seen_v = keys[self._rows, :, begin:end], values[self._rows, :, begin:end]  # (rows, kv_heads, L, D)
        if not plain:
            bias = None if hidden is None else hidden[:, None]  # (rows or 1, 1, T, L)
            if scores.bias is not None:
                index = torch.arange(begin, end, device=q.device)[None]
                added = scores.bias(self.positions, index).to(q.dtype)
                bias = added if bias is None else added + bias
            return plain_attention(q.transpose(1, 2), seen_k, seen_v, scores, bias).transpose(1, 2)
        if self._new > 1:
            return attend_packed(q, seen_k, seen_v, hidden, scores.scale)
        rows, _, heads, dim = q.shape
        tile = q.view(rows, seen_k.shape[1], -1, dim)  # (rows, kv_heads, heads / kv_heads, D)
        bias = None if hidden is None else hidden[:, None]
        out = F.scaled_dot_product_attention(tile, seen_k, seen_v, bias, scale=scores.scale)
        return out.reshape(rows, 1, heads, out.shape[-1])

    def _attend_fresh(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """Nothing came before: the step's own keys are all there is."""
        if scores.mask not in self._lowered:
            self._lowered[scores.mask] = lower(scores.mask, self._new, dtype=q.dtype, device=q.device)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (rows, heads, T, D)
        return attend(q, k, v, scores, self._lowered[scores.mask]).transpose(1, 2)

    def _write(self, store: Tensor, new: Tensor) -> None:
        """store (slots, kv_heads, room, D) <- new (rows, T, kv_heads, D)."""
        if self._level and isinstance(self._rows, slice):
            store[self._rows, :, self._low : self._low + self._new] = new.transpose(1, 2)
            return
        kv_heads, dim = new.shape[2:]
        if kv_heads not in self._places:
            slots = torch.arange(len(store), device=store.device)[self._rows]  # (rows,)
            head = torch.arange(kv_heads, device=store.device)
            place = (slots[:, None, None] * kv_heads + head) * self._cache.room + self.positions[..., None]
            self._places[kv_heads] = place.flatten()  # (rows * T * kv_heads,)
        store.view(-1, dim).index_copy_(0, self._places[kv_heads], new.reshape(-1, dim))

    def _window(self, mask: Mask) -> int | None:
        """How many keys a mask that is nothing but a causal window shows, 0 for all of them; None: it is another
        mask."""
        if mask not in self._windows:
            size = reach(mask)
            window = 0 if mask == Causal() else size
            self._windows[mask] = window if window == 0 or mask == Causal() & Window(window or 1) else None
        return self._windows[mask]

    def _hidden(self, mask: Mask, end: int, dtype: torch.dtype) -> tuple[int, Tensor | None]:
        """The first key that any query may see, and what is added to the scores of the keys from there to `end`:
        (rows or 1, T, L), 0 or -inf; None where every query sees them all."""
        if mask not in self._biases:
            window = reach(mask)
            begin = 0 if window is None else max(0, self._low + 1 - window)
            every = fit(mask, end, end) in (Causal(), Bidirectional())
            bias = None
            if self._new > 1 or not self._level or not every:
                index = torch.arange(begin, end, device=self.positions.device)
                shown = mask.dense(self.positions[:1] if self._level else self.positions, index)
                if not (self._new == 1 and self._level and bool(shown.all())):
                    bias = torch.zeros(shown.shape, dtype=dtype, device=index.device).masked_fill_(
                        ~shown, float("-inf")
                    )
            self._biases[mask] = begin, bias
        return self._biases[mask]
