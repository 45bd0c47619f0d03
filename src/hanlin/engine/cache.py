"""Keys and values of running sequences in one contiguous tensor a layer.

    keys, values: (slots, kv_heads, capacity, head_dim)      slot = one sequence; lengths (slots,) = tokens held

`step` gives the `nn.attention.Cache` of one forward pass over some slots. Running sequences are kept in the first slots
(`move`), so that a decode step attends over a strided view and copies nothing. The paged cache will stand behind the
same two calls.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hanlin.models.config import ModelConfig
from hanlin.nn.attention import Cache


class ContiguousCache:
    """Room for `slots` sequences of `capacity` tokens; grows nothing, checks its bounds."""

    def __init__(
        self, config: ModelConfig, *, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        raise NotImplementedError

    lengths: Tensor  # (slots,) int64

    def step(self, slots: Sequence[int], new: int) -> Cache:
        """The cache of one forward pass that appends `new` tokens to each of `slots`.

        Lengths advance when the step is made; a forward that failed is undone with `truncate`.
        """
        raise NotImplementedError

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything of a slot past `length` tokens (0 frees it)."""
        raise NotImplementedError

    def move(self, source: int, target: int) -> None:
        """Copy a sequence to another slot."""
        raise NotImplementedError
