"""Attention of one new token a sequence over the engine's cache (`native/attention.cpp`).

One call writes the new keys and values and attends; the query heads of a key head go through its keys together.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hanlin.kernels.library import INTEGER, POINTER, REAL, function


class Decode(ctypes.Structure):
    """As in native/attention.cpp."""

    _fields_ = [
        ("lengths", POINTER),
        *((name, INTEGER) for name in ("rows", "slot", "room", "heads", "kv_heads", "width", "value_width", "window")),
        ("scale", REAL),
    ]


class DecodeStep:
    """One forward pass that appends a token to each of the sequences in slots `slot`, `slot + 1`, …

    lengths: tokens that each of them holds before this one.
    """

    def __init__(self, lengths: Sequence[int], slot: int) -> None:
        self._rows, self._slot = len(lengths), slot
        self._lengths = (INTEGER * len(lengths))(*lengths)
        self._longest = max(lengths)
        self._descriptions: dict[tuple, tuple[Decode, int]] = {}  # of the layers' shapes, and their addresses

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int
    ) -> Tensor | None:
        """Write k, v (rows, 1, kv_heads, D) into keys, values (slots, kv_heads, room, D) and let q (rows, 1, heads, D)
        attend to all that its sequence then holds, or to the last `window` of it (0: all).

        Returns (rows, 1, heads, value width), or None, and nothing written, where the kernel cannot do it."""
        run = function("attend", q.dtype)
        heads, width = q.shape[2:]
        kv_heads, room = keys.shape[1:3]
        value_width = v.shape[3]
        if (
            run is None
            or not (k.dtype == v.dtype == keys.dtype == values.dtype == q.dtype)
            or not q.is_cpu
            or not (_is_packed(q, width) and _is_packed(k, width) and _is_packed(v, value_width))
            or not (keys.is_contiguous() and values.is_contiguous())
        ):
            return None
        assert self._longest < room and self._slot + self._rows <= len(keys), "the cache is too small"
        shape = (room, heads, kv_heads, width, value_width, window, scale)
        if shape not in self._descriptions:
            description = Decode(ctypes.addressof(self._lengths), self._rows, self._slot, *shape)
            self._descriptions[shape] = description, ctypes.addressof(description)
        out = q.new_empty((self._rows, 1, heads, value_width))
        run(
            self._descriptions[shape][1],
            q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
            keys.data_ptr(), values.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


def attend_twin(
    lengths: Sequence[int], slot: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *,
    scale: float, window: int,
) -> Tensor:  # fmt: skip
    """What `DecodeStep.attend` computes and writes, a row at a time."""
    out = []
    for row, length in enumerate(lengths):
        keys[slot + row, :, length], values[slot + row, :, length] = k[row, 0], v[row, 0]
        begin = max(0, length + 1 - window) if window else 0
        group = q.shape[2] // keys.shape[1]
        seen = [t[slot + row, :, begin : length + 1].float().repeat_interleave(group, 0) for t in (keys, values)]
        scores = q[row, 0].float()[:, None] @ seen[0].transpose(-1, -2) * scale  # (heads, 1, seen)
        out.append((scores.softmax(-1) @ seen[1]).transpose(0, 1))  # (1, heads, value width)
    return torch.stack(out).to(q.dtype)


def _is_packed(x: Any, width: int) -> bool:
    """Whether the heads of (rows, 1, heads, width) stand one behind the other."""
    return x.stride(3) == 1 and (x.stride(2) == width or x.shape[2] == 1)
