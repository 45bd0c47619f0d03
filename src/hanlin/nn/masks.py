"""A mask is a value: small frozen objects that say which keys a query may see, combined with `&` and `|`.

    Causal() & Window(4096) & SameDocument(ids)        Prefix(n) | Causal()        Local(w) | Dilated(k)

Each mask is one predicate over (row, query, key): `sees`. Every other form follows from it: the dense matrix (`dense`)
and what a kernel wants (`nn.mask_lowering`). Indices count from 0 in the row, so that cached and uncached passes agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from operator import and_, or_
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError

if TYPE_CHECKING:  # at run time `__getattr__` below: `mask_lowering` imports this file
    from hanlin.nn.mask_lowering import Lowered as Lowered
    from hanlin.nn.mask_lowering import lower as lower


class Mask:
    """Base of all masks. A new one is a frozen dataclass that defines `sees`, and `rows` where it differs from row
    to row. Tensors in a mask live on the device of the indices it is asked about."""

    @property
    def rows(self) -> int:
        """How many rows of a batch the mask tells apart; 1: it says the same of each."""
        return 1

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q of this row sees key k: integer tensors that broadcast -> bool that broadcasts with them."""
        raise NotImplementedError

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """q (Tq,) or (rows, Tq), k (Tk,) or (rows, Tk): indices in the row -> bool, broadcastable to (rows, Tq, Tk),
        always of three dimensions, True where visible."""
        row = torch.arange(self.rows, device=q.device)[:, None, None]
        return self.sees(row, torch.atleast_2d(q)[..., :, None], torch.atleast_2d(k)[..., None, :])

    def __and__(self, other: "Mask") -> "Mask":
        parts = [part for part in _distinct(And, self, other) if part != Bidirectional()]
        if not parts:
            return Bidirectional()
        return And(tuple(parts)) if len(parts) > 1 else parts[0]

    def __or__(self, other: "Mask") -> "Mask":
        parts = _distinct(Or, self, other)
        if Bidirectional() in parts:
            return Bidirectional()
        return Or(tuple(parts)) if len(parts) > 1 else parts[0]

    def __str__(self) -> str:
        values = [getattr(self, field.name) for field in fields(self)] if is_dataclass(self) else []
        return f"{type(self).__name__}({', '.join(_shown(value) for value in values)})"


# --- one rule for every row ---


@dataclass(frozen=True)
class Bidirectional(Mask):
    """A query sees every key (BERT, arXiv:1810.04805)."""

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.ones_like(k, dtype=torch.bool)


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees itself and what came before."""

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q


@dataclass(frozen=True)
class Window(Mask):
    """A query sees no key further back than the `size` that end with itself (Mistral, arXiv:2310.06825); what comes
    after is not its business: `Causal() & Window(size)`."""

    size: int

    def __post_init__(self) -> None:
        _check_count(self, "size", self.size)

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q - k < self.size


@dataclass(frozen=True)
class Local(Mask):
    """A query sees keys nearer than `size`, before and after: |q - k| < size."""

    size: int

    def __post_init__(self) -> None:
        _check_count(self, "size", self.size)

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).abs() < self.size


@dataclass(frozen=True)
class Dilated(Mask):
    """A query sees keys at distance 0, step, 2 step, 3 step …, before and after."""

    step: int

    def __post_init__(self) -> None:
        _check_count(self, "step", self.step)

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % self.step == 0


@dataclass(frozen=True)
class Chunk(Mask):
    """A query sees its own block of `size` only, blocks counted from 0 (Llama 4's layers with rotary positions)."""

    size: int

    def __post_init__(self) -> None:
        _check_count(self, "size", self.size)

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q // self.size == k // self.size


# --- rules that differ from row to row ---


@dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the first `length` keys: one number, or one a row (a tensor (rows,) becomes a tuple).

    `Prefix(n) | Causal()` is the prefix language model (UniLM, arXiv:1905.03197; T5, arXiv:1910.10683)."""

    length: int | Sequence[int] | Tensor

    def __post_init__(self) -> None:
        length = self.length.tolist() if isinstance(self.length, Tensor) else self.length
        if isinstance(length, Sequence) and not isinstance(length, str):
            length = tuple(length)
        object.__setattr__(self, "length", length)
        for number in self.lengths or (length,):
            _check_count(self, "length", number, least=0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """One number a row; a single one where all rows have the same."""
        return self.length if isinstance(self.length, tuple) else (cast(int, self.length),)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if self.rows == 1:
            return k < self.lengths[0]
        return k < torch.tensor(self.lengths, device=k.device)[row]


@dataclass(frozen=True, eq=False)
class SameDocument(Mask):
    """A query sees keys of its own document only. ids (rows, T) integers: one number a document, any number a row."""

    ids: Tensor

    def __post_init__(self) -> None:
        _check_table(self, "ids", self.ids, boolean=False)

    @property
    def rows(self) -> int:
        return len(self.ids)

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _entry(self.ids, row, q) == _entry(self.ids, row, k)


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """No query sees a padded key. valid (rows, T) bool: True where there is a token."""

    valid: Tensor

    def __post_init__(self) -> None:
        _check_table(self, "valid", self.valid, boolean=True)

    @property
    def rows(self) -> int:
        return len(self.valid)

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _entry(self.valid, row, k)


@dataclass(frozen=True, eq=False)
class Permutation(Mask):
    """A query sees what comes no later in the factorisation order (XLNet, arXiv:1906.08237, eq. 3–4).

    order (rows, T) integers: the rank of each token. strict: not itself either, as in the query stream, where the
    token of rank 0 sees nothing; otherwise it sees itself, as in the content stream.
    """

    order: Tensor
    strict: bool = False

    def __post_init__(self) -> None:
        _check_table(self, "order", self.order, boolean=False)

    @property
    def rows(self) -> int:
        return len(self.order)

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own, other = _entry(self.order, row, q), _entry(self.order, row, k)
        return other < own if self.strict else other <= own


# --- combinations: written `a & b` and `a | b`, which flatten and drop what says nothing ---


@dataclass(frozen=True)
class _Joined(Mask):
    parts: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise HanlinError("A combination of masks needs at least one part; what hides nothing is Bidirectional().")
        different = {part.rows: part for part in self.parts if part.rows != 1}
        if len(different) > 1:
            found = ", ".join(f"{rows} in {part}" for rows, part in different.items())
            raise HanlinError(f"The masks of one batch must be of as many rows as each other; found {found}.")

    @property
    def rows(self) -> int:
        return next((part.rows for part in self.parts if part.rows != 1), 1)


@dataclass(frozen=True)
class And(_Joined):
    """Visible where every part says so."""

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return reduce(and_, [part.sees(row, q, k) for part in self.parts])

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Or) else str(part) for part in self.parts)


@dataclass(frozen=True)
class Or(_Joined):
    """Visible where any part says so."""

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return reduce(or_, [part.sees(row, q, k) for part in self.parts])

    def __str__(self) -> str:
        return " | ".join(f"({part})" if isinstance(part, And) else str(part) for part in self.parts)


# --- patterns of the literature ---


def sparse_transformer(size: int, step: int, *, causal: bool = True) -> Mask:
    """The near keys and every `step`-th of the far ones (Sparse Transformer, arXiv:1904.10509; its strided pattern of
    stride l is size = step = l). causal=False: the same in both directions."""
    mask = Local(size) | Dilated(step)
    return Causal() & mask if causal else mask


def banded(size: int) -> Mask:
    """GPT-3's locally banded layer (arXiv:2005.14165, section 2.1): the `size` keys that end with the query."""
    return Causal() & Window(size)


def alternating(dense: Mask, sparse: Mask, depth: int) -> tuple[Mask, ...]:
    """The mask of each of `depth` layers: dense, sparse, dense, …; GPT-3: `alternating(Causal(), banded(n), depth)`."""
    return tuple(sparse if layer % 2 else dense for layer in range(depth))


# --- what can be known of a mask without looking at any index ---


def hides_the_future(mask: Mask) -> bool:
    """Whether certainly no query sees a later key."""
    if isinstance(mask, And):
        return any(hides_the_future(part) for part in mask.parts)
    if isinstance(mask, Or):
        return all(hides_the_future(part) for part in mask.parts)
    return isinstance(mask, Causal)


def reach(mask: Mask) -> int | None:
    """How many keys back a query sees at most, itself included: what lies behind may leave a cache. None: unbounded.

    `reach(Causal() & Window(5))` is 5: query q sees no key before q - 4.
    """
    if isinstance(mask, Window | Local | Chunk):
        return mask.size
    if isinstance(mask, And | Or):
        reaches = [reach(part) for part in mask.parts]
        bounded = [number for number in reaches if number is not None]
        if isinstance(mask, And):
            return min(bounded, default=None)
        return max(bounded) if len(bounded) == len(reaches) else None
    return None


# --- helpers ---


def _distinct(kind: type[And] | type[Or], *masks: Mask) -> list[Mask]:
    """The parts of all `masks`, those of the same kind taken apart, each once: a & (b & a) is a & b."""
    parts: list[Mask] = []
    for mask in masks:
        parts.extend(mask.parts if isinstance(mask, kind) else (mask,))
    return list(dict.fromkeys(parts))


def _entry(table: Tensor, row: Tensor, index: Tensor) -> Tensor:
    """table (rows, T) read at (row, index); a table of one row says the same of every row."""
    return table[0][index] if len(table) == 1 else table[row, index]


def _check_count(mask: Mask, name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise HanlinError(f"{type(mask).__name__}: {name} is {value!r}, expected a whole number of at least {least}.")


def _check_table(mask: Mask, name: str, table: Tensor, *, boolean: bool) -> None:
    right = (table.dtype == torch.bool) == boolean and not table.is_floating_point() and not table.is_complex()
    if table.dim() != 2 or not right:
        raise HanlinError(
            f"{type(mask).__name__}: {name} is {table.dtype} of shape {tuple(table.shape)}, "
            f"expected {'bool' if boolean else 'integers'} of shape (rows, T)."
        )


def _shown(value: object) -> str:
    return " x ".join(str(size) for size in value.shape) if isinstance(value, Tensor) else repr(value)


def __getattr__(name: str) -> Callable | type:
    """`lower` and `Lowered` may be imported from here: those who use a mask mostly want both."""
    if name in ("lower", "Lowered"):
        from hanlin.nn import mask_lowering

        return getattr(mask_lowering, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
