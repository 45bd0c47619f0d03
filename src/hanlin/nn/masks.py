"""A mask is a value: small frozen objects that say which keys a query may see, combined with `&` and `|`.

    Causal() & Window(4096) & SameDocument(ids)

`lower` turns a mask into what the attention kernel wants, once a forward pass and not once a layer: the causal flag
when that is exact, otherwise a dense matrix of 0 and -inf in the activation's dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class Mask:
    """Base of all masks. `dense(q, k)` is the definition; everything else is a faster way to say the same."""

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """q (Tq,) and k (Tk,): indices of queries and keys in the row -> bool, broadcastable to (rows, Tq, Tk)."""
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And((self, other))

    def __or__(self, other: "Mask") -> "Mask":
        return Or((self, other))


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees itself and what came before."""

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        return (k[None, :] <= q[:, None])[None]


@dataclass(frozen=True)
class Window(Mask):
    """A query sees the `size` keys that end with itself (Mistral, arXiv:2310.06825)."""

    size: int

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        return (q[:, None] - k[None, :] < self.size)[None]


@dataclass(frozen=True, eq=False)
class SameDocument(Mask):
    """A query sees keys of its own document only. ids (rows, T) integers: one number a document, any number a row."""

    ids: Tensor

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        return self.ids[:, q][:, :, None] == self.ids[:, k][:, None, :]


@dataclass(frozen=True)
class And(Mask):
    parts: tuple[Mask, ...]

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        return _reduce(torch.logical_and, [part.dense(q, k) for part in self.parts])


@dataclass(frozen=True)
class Or(Mask):
    parts: tuple[Mask, ...]

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        return _reduce(torch.logical_or, [part.dense(q, k) for part in self.parts])


@dataclass(frozen=True, eq=False)
class Lowered:
    """What the kernel gets. causal: no query sees a later key. bias (rows or 1, 1, T, T): 0 where visible, else -inf;
    None where the flag alone says everything."""

    causal: bool
    bias: Tensor | None


def lower(mask: Mask, length: int, *, dtype: torch.dtype, device: torch.device) -> Lowered:
    """The cheapest exact form of `mask` for self-attention over `length` tokens."""
    if isinstance(mask, Causal) or (_is_causal_window(mask) and _window(mask) >= length):
        return Lowered(True, None)
    index = torch.arange(length, device=device)
    visible = mask.dense(index, index)
    bias = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
    return Lowered(_hides_the_future(mask), bias[:, None])


def _hides_the_future(mask: Mask) -> bool:
    if isinstance(mask, And):
        return any(_hides_the_future(part) for part in mask.parts)
    if isinstance(mask, Or):
        return all(_hides_the_future(part) for part in mask.parts)
    return isinstance(mask, Causal)


def _is_causal_window(mask: Mask) -> bool:
    return isinstance(mask, And) and {type(p) for p in mask.parts} == {Causal, Window}


def _window(mask: Mask) -> int:
    assert isinstance(mask, And)
    return min(part.size for part in mask.parts if isinstance(part, Window))


def _reduce(operation, parts: list[Tensor]) -> Tensor:
    result = parts[0]
    for part in parts[1:]:
        result = operation(result, part)
    return result
