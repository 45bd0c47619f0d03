"""What the layers of one forward pass share: rotary tables, lowered masks, position biases, each made once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hanlin.models.config import BlockRopePosition, LatentAttentionConfig, Mixer
from hanlin.nn.attention import Cache, PositionBias
from hanlin.nn.mask_lowering import Lowered, lower
from hanlin.nn.masks import Bidirectional, Causal, Mask
from hanlin.nn.relative_attention import distance_table
from hanlin.nn.rope import Rope, block_rope_tables
from hanlin.nn.routing import Routing

Tables = tuple[Tensor, Tensor]


class RowSharing(Protocol):
    """Ranks that hold the tokens of every row together (`parallel.context`)."""

    def step(self, rows: int, length: int, mask: Mask | None, device: torch.device) -> Cache:
        """Stands in the place of a cache for a forward pass over this rank's `length` tokens of each row. mask: the
        caller's, over whole rows."""
        ...


@dataclass
class Shared:
    """positions (rows or 1, T), or (2, rows, T) for `BlockRopePosition`; mask: the caller's, or None for the layer's
    own; cache: one step of it; source (rows, S, width): what an encoder read; reads: which of it counts (None: all);
    segments (rows, T); routing: filled by layers with experts; longest: positions the model was made for.
    """

    positions: Tensor
    length: int
    dtype: torch.dtype
    longest: int
    mask: Mask | None = None
    cache: Cache | None = None
    source: Tensor | None = None
    reads: Lowered | None = None
    segments: Tensor | None = None
    routing: list[Routing] = field(default_factory=list)
    _made: dict[Any, Any] = field(default_factory=dict)

    def rope(self, attention: Mixer) -> Tables | None:
        """The tables by which this layer's queries and keys turn; None: they do not."""
        position = attention.position
        if not isinstance(position, Rope | BlockRopePosition):
            return None
        width = attention.rope_dim if isinstance(attention, LatentAttentionConfig) else attention.head_dim
        return self._once((position, width), lambda: self._tables(position, width))

    def distances(self, width: int) -> Tensor:
        """The sinusoids of all distances between two tokens of a row (`nn.relative_attention`)."""
        length, dtype, device = self.length, self.dtype, self.positions.device
        return self._once(
            ("distances", width), lambda: distance_table(length, length, width, dtype=dtype, device=device)
        )

    def lowered(self, attention: Mixer, bias: PositionBias | None) -> Lowered | Mask | None:
        """This layer's mask as the kernel wants it, its position bias added. With a cache, which lowers masks itself:
        None, for the layer's own, or the caller's mask within the layer's limits."""
        if self.cache is not None:
            return None if self.mask is None else self.mask & attention.limits
        return self._once((attention.limits, attention.bidirectional, bias), lambda: self._lower(attention, bias))

    def _lower(self, attention: Mixer, bias: PositionBias | None) -> Lowered:
        base = self.mask or (Bidirectional() if attention.bidirectional else Causal())
        device = self.positions.device
        found = lower(base & attention.limits, self.length, dtype=self.dtype, device=device)
        if bias is None:
            return found
        added = bias(self.positions, self.positions).to(self.dtype)  # (rows or 1, heads, T, T)
        if found.bias is not None:
            added = added + found.bias
        elif found.causal:
            future = torch.full((self.length, self.length), float("-inf"), dtype=self.dtype, device=device)
            added = added + future.triu_(1)
        return Lowered(found.causal, added, found.blind)

    def _tables(self, position: Rope | BlockRopePosition, width: int) -> Tables:
        if isinstance(position, BlockRopePosition):
            return block_rope_tables(self.positions, width, position.theta, self.dtype, half=position.half)
        if self.cache is None or position.scaling is None or not position.scaling.by_length:
            return position.tables(self.positions, width, self.dtype, longest=self.longest)
        # a row may hold several sequences: each token turns by the length of its own
        each, lengths = self.positions.reshape(-1, 1), self.cache.lengths.reshape(-1, 1)
        tables = position.tables(each, width, self.dtype, longest=self.longest, length=lengths)
        cos, sin = (t.view(*self.positions.shape, *t.shape[2:]) for t in tables)
        return cos, sin

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
