"""How the tensors of one rank sit in those of the whole model, and how pieces become whole again.

    whole ──cut by `Share`s──▶ what a rank of a tensor or expert group holds ──flat `span`──▶ its share of ZeRO

    Share(dim 0, pieces 2, units 4, 1..3)      rows of the whole:  g0 [g1 g2] g3 | u0 [u1 u2] u3     (gate over up)

A piece is described by where it sits and never by a rank, so ranks that hold the same piece say the same, one of them
writes it (`assign`), and another number of ranks takes other pieces of the whole (`take`). Tensors here are values: no
process group, no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError

Shape = tuple[int, ...]
Span = tuple[int, int]


@dataclass(frozen=True)
class Share:
    """Units [start, stop) along dimension `dim`, which is made of `pieces` equal tensors one behind the other with
    `units` units each (see `models.tensor_plan.Cut`). Experts of a rank: pieces 1, a unit an expert."""

    dim: int
    pieces: int
    units: int
    start: int
    stop: int

    def width(self, size: int) -> int:
        """Rows of a unit, of a whole dimension of `size` rows."""
        width, rest = divmod(size, self.pieces * self.units)
        if rest or not 0 <= self.start < self.stop <= self.units:
            raise ValueError(f"{self} does not fit a dimension of {size}.")
        return width


@dataclass(frozen=True)
class Held:
    """A tensor of this rank. name: of the whole tensor; shape: of the whole tensor; cuts: in different dimensions;
    span: flat [start, stop) of what the cuts leave, then `tensor` has one dimension."""

    name: str
    tensor: Tensor
    shape: Shape
    cuts: tuple[Share, ...] = ()
    span: Span | None = None

    def __post_init__(self) -> None:
        local = local_shape(self.shape, self.cuts)
        start, stop = self.span or (0, prod(local))
        wanted = local if self.span is None else (stop - start,)
        if tuple(self.tensor.shape) != wanted or not 0 <= start <= stop <= prod(local):
            raise ValueError(
                f"{self.name}: a tensor of shape {list(self.tensor.shape)} is not the piece {self.cuts} {self.span} of "
                f"one of shape {list(self.shape)}."
            )

    def simplest(self) -> "Held":
        """The same, without cuts and spans that leave all of it."""
        cuts = tuple(cut for cut in self.cuts if (cut.start, cut.stop) != (0, cut.units))
        local = local_shape(self.shape, cuts)
        if self.span not in (None, (0, prod(local))):
            return replace(self, cuts=cuts)
        return replace(self, tensor=self.tensor.view(local), cuts=cuts, span=None)

    @property
    def place(self) -> "Place":
        return Place(self.name, self.tensor.dtype, self.shape, self.cuts, self.span)


@dataclass(frozen=True)
class Place:
    """Where a piece sits: a `Held` without its numbers."""

    name: str
    dtype: torch.dtype
    shape: Shape
    cuts: tuple[Share, ...] = ()
    span: Span | None = None

    @property
    def whole(self) -> bool:
        return not self.cuts and self.span is None

    @property
    def bytes(self) -> int:
        count = prod(local_shape(self.shape, self.cuts)) if self.span is None else self.span[1] - self.span[0]
        return count * self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """How it sits, for a manifest; the name, dtype and whole shape stand there once for all pieces."""
        cuts = [[c.dim, c.pieces, c.units, c.start, c.stop] for c in self.cuts]
        return ({"cuts": cuts} if cuts else {}) | ({"span": list(self.span)} if self.span is not None else {})

    @classmethod
    def from_json(cls, name: str, dtype: torch.dtype, shape: Shape, value: dict[str, Any]) -> "Place":
        start, stop = value.get("span", (0, 0))
        span = (int(start), int(stop)) if "span" in value else None
        cuts = tuple(Share(*map(int, cut)) for cut in value.get("cuts", []))
        return cls(name, dtype, shape, cuts, span)


def local_shape(shape: Shape, cuts: Sequence[Share]) -> Shape:
    """Of what the cuts leave of a tensor of `shape`."""
    sizes = list(shape)
    for cut in cuts:
        sizes[cut.dim] = cut.pieces * (cut.stop - cut.start) * cut.width(shape[cut.dim])
    return tuple(sizes)


def take(whole: Tensor, cuts: Sequence[Share] = (), span: Span | None = None) -> Tensor:
    """The piece of a whole tensor, contiguous; it may be the tensor itself."""
    local = _region(whole, cuts).reshape(local_shape(tuple(whole.shape), cuts)) if cuts else whole
    return local if span is None else local.reshape(-1)[span[0] : span[1]]


def join(shape: Shape, pieces: Sequence[tuple[Place, Tensor]]) -> Tensor:
    """The whole tensor of its pieces, in any order; `ValueError` if they leave a gap."""
    if len(pieces) == 1 and pieces[0][0].whole:
        return pieces[0][1]
    whole = pieces[0][1].new_empty(shape)
    found = 0
    by_cuts: dict[tuple[Share, ...], list[tuple[Place, Tensor]]] = {}
    for place, tensor in pieces:
        by_cuts.setdefault(place.cuts, []).append((place, tensor))
    for cuts, parts in by_cuts.items():
        local = fill(parts, (0, prod(local_shape(shape, cuts))))
        region = _region(whole, cuts)
        region.copy_(local.view(region.shape))
        found += local.numel()
    if found != whole.numel():
        raise ValueError(f"the pieces hold {found} numbers of {whole.numel()}")
    return whole


def fill(parts: Sequence[tuple[Place, Tensor]], span: Span) -> Tensor:
    """Numbers [start, stop) of a tensor from `parts` with the same cuts, flat. The tensor of a part: its numbers that
    lie in the span, in order. `ValueError` if they leave a gap."""
    at, stop = span
    pieces: list[Tensor] = []
    for place, tensor in sorted(parts, key=lambda part: part[0].span or (0, 0)):
        begin, end = overlap(place, span)
        if begin == end:
            continue
        if begin != at or tensor.numel() != end - begin:
            raise ValueError(f"the pieces leave a gap before number {begin}, or overlap")
        pieces.append(tensor.reshape(-1))
        at = end
    if at != stop:
        raise ValueError(f"the pieces end at number {at} of {stop}")
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else parts[0][1].new_empty(0)


def overlap(place: Place, span: Span) -> Span:
    """What a piece holds of the flat span, in the numbers of the cut tensor."""
    start, stop = place.span or (0, prod(local_shape(place.shape, place.cuts)))
    begin = max(start, span[0])
    return begin, max(begin, min(stop, span[1]))


def assign(offers: Sequence[Sequence[Place]]) -> list[list[int]]:
    """Who writes what. offers: of each rank, what it holds. Returns of each rank the numbers of the places it writes:
    each piece once, by the one of its holders that has least to write so far. `HanlinError` for a tensor that has gaps,
    or whose ranks disagree on what it is.
    """
    holders: dict[Place, list[tuple[int, int]]] = {}
    for rank, places in enumerate(offers):
        for number, place in enumerate(places):
            holders.setdefault(place, []).append((rank, number))
    check_complete(list(holders))
    mine: list[list[int]] = [[] for _ in offers]
    load = [0] * len(offers)
    for place in sorted(holders, key=lambda p: (-p.bytes, p.name, p.span or (0, 0), repr(p.cuts))):
        rank, number = min(holders[place], key=lambda who: (load[who[0]], who[0]))
        mine[rank].append(number)
        load[rank] += place.bytes
    return [sorted(numbers) for numbers in mine]


def check_complete(places: Sequence[Place]) -> None:
    """`HanlinError` if the pieces of a tensor differ in dtype or shape, overlap, or are not all of it."""
    by_name: dict[str, list[Place]] = {}
    for place in places:
        by_name.setdefault(place.name, []).append(place)
    for name, pieces in by_name.items():
        if len({(p.dtype, p.shape) for p in pieces}) > 1:
            kinds = sorted({f"{p.dtype} {list(p.shape)}" for p in pieces})
            raise HanlinError(f"The ranks do not agree what {name} is: {' or '.join(kinds)}.")
        regions: dict[tuple[Share, ...], list[Span]] = {}
        for piece in pieces:
            all_of_it = prod(local_shape(piece.shape, piece.cuts))
            regions.setdefault(piece.cuts, []).append(piece.span or (0, all_of_it))
        covered = 0
        for cuts, spans in regions.items():
            at = 0
            for start, stop in sorted(spans):
                if start != at:
                    raise HanlinError(f"{name}: no rank holds the numbers {at} to {start} of {list(cuts)}, or two do.")
                at = stop
            covered += at
        if covered != prod(pieces[0].shape):
            raise HanlinError(f"{name}: the ranks hold {covered} different numbers of {prod(pieces[0].shape)}.")


def _region(whole: Tensor, cuts: Sequence[Share]) -> Tensor:
    """A view of what the cuts leave, each cut dimension as (pieces, units, rows of a unit)."""
    view = whole
    for cut in sorted(cuts, key=lambda c: -c.dim):  # from the last dimension, so that the numbers before it hold
        units = view.unflatten(cut.dim, (cut.pieces, cut.units, cut.width(whole.shape[cut.dim])))
        view = units.narrow(cut.dim + 1, cut.start, cut.stop - cut.start)
    return view
