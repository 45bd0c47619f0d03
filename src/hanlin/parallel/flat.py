"""Parameters, or their gradients, end to end in one buffer: a collective of a few large messages instead of many small.

    q_proj.weight | k_proj.weight | v_proj.weight | o_proj.weight | norm | ... | padding        one dtype, one device
    \\________ one matrix, `PackedLinear` ________/                                size: a multiple of the ranks

Projections that are computed as one product lie side by side, so that their common matrix is a view of the buffer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hanlin.nn.linear import PackedLinear

Named = dict[str, nn.Parameter]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a parameter lies in its buffer: [start, stop)."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int

    def view(self, buffer: Tensor) -> Tensor:
        """Its part of a buffer (size,), in its shape."""
        return buffer[self.start : self.stop].view(self.parameter.shape)


@dataclass(frozen=True)
class Pack:
    """The weights or biases (`kind`) of the projections of one packed module."""

    module: PackedLinear
    kind: str
    members: tuple[nn.Parameter, ...]


class Flat:
    """The layout of one buffer. named: of one dtype, one device, all trainable or none. size: numbers, with padding;
    share: of one rank."""

    def __init__(self, named: Named, ranks: int = 1) -> None:
        self.places: list[Place] = []
        end = 0
        for name, parameter in named.items():
            self.places.append(Place(name, parameter, end, end + parameter.numel()))
            end += parameter.numel()
        first = next(iter(named.values()))
        self.numel, self.dtype, self.device = end, first.dtype, first.device
        self.trainable = first.requires_grad
        self.share = -(-end // ranks)
        self.size = self.share * ranks

    def new(self) -> Tensor:
        """An empty buffer (size,)."""
        return torch.empty(self.size, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def lay(self, packs: Iterable[Pack]) -> Tensor:
        """Move the parameters into a new buffer (size,), of which they become views."""
        buffer = self.new()
        buffer[self.numel :].zero_()
        starts = {}
        for place in self.places:
            view = place.view(buffer)
            view.copy_(place.parameter)
            place.parameter.data = view
            starts[id(place.parameter)] = place.start
        for pack in packs:
            start = starts.get(id(pack.members[0]))
            if start is None:
                continue
            expected = start
            for member in pack.members:  # one that is frozen beside trained ones lies elsewhere
                if starts.get(id(member)) != expected:
                    break
                expected += member.numel()
            else:
                pack.module.lay_in(pack.kind, buffer[start:expected].view(-1, *pack.members[0].shape[1:]))
        return buffer

    def pieces(self, rank: int) -> list[tuple[Place, int, int]]:
        """What a rank's share holds of which parameter, as [start, stop) in the parameter; nothing is left out."""
        low, high = rank * self.share, (rank + 1) * self.share
        found = []
        for place in self.places:
            start, stop = max(place.start, low), min(place.stop, high)
            if start < stop:
                found.append((place, start - place.start, stop - place.start))
        return found


class Gradients:
    """The gradients of a `Flat`'s parameters in one buffer, which lives from the first of them on.

    keep: each `.grad` becomes a view of the buffer, and further backwards add in place. Else the gradient is taken
    away, and what a further backward brings is added here.
    """

    def __init__(self, flat: Flat, *, keep: bool) -> None:
        self.flat, self._keep = flat, keep
        self._buffer: Tensor | None = None
        self._filled: set[int] = set()

    @property
    def empty(self) -> bool:
        """Whether nothing has arrived."""
        return not self._filled

    @torch.no_grad()
    def take(self, place: Place) -> None:
        """A parameter's `.grad` moves into the buffer."""
        parameter = place.parameter
        if parameter.grad is None:
            return
        if self._buffer is None:
            self._buffer = self.flat.new()
        view = place.view(self._buffer)
        filled = id(place) in self._filled
        self._filled.add(id(place))
        if not self._keep:
            _ = view.add_(parameter.grad) if filled else view.copy_(parameter.grad)
            parameter.grad = None
        elif not filled or parameter.grad.data_ptr() != view.data_ptr():
            view.copy_(parameter.grad)
            parameter.grad = view

    @torch.no_grad()
    def complete(self) -> Tensor:
        """The buffer (size,), with zeros where no gradient came."""
        for place in self.flat.places:
            self.take(place)
        if self._buffer is None:
            self._buffer = self.flat.new()
        self._buffer[self.flat.numel :].zero_()
        for place in self.flat.places:
            if id(place) not in self._filled:
                view = place.view(self._buffer).zero_()
                if self._keep:
                    place.parameter.grad = view
        return self._buffer

    def drop(self, *, memory: bool) -> None:
        """Every `.grad` is None. memory: give the buffer back, too."""
        for place in self.flat.places:
            place.parameter.grad = None
        self._filled.clear()
        if memory:
            self._buffer = None


class InOrder:
    """Starts the reduction of each buffer once all its gradients are there, and in the same order on every rank: a
    buffer waits for those before it. start: called with the number of the buffer."""

    def __init__(self, flats: Iterable[Flat], start: Callable[[int], None]) -> None:
        self._counts = [len(flat.places) for flat in flats]
        self._start = start
        self.reset()

    def reset(self) -> None:
        """Before a backward."""
        self._missing = list(self._counts)
        self._next = 0

    def arrived(self, number: int) -> None:
        """One more gradient of this buffer is there."""
        self._missing[number] -= 1
        while self._next < len(self._missing) and self._missing[self._next] <= 0:
            self._advance()

    def started(self, number: int) -> bool:
        return number < self._next

    def flush(self) -> None:
        """Start those that miss a gradient, too."""
        while self._next < len(self._missing):
            self._advance()

    def _advance(self) -> None:
        self._next += 1
        self._start(self._next - 1)


def find_packs(model: nn.Module) -> list[Pack]:
    """The parameters of `model` that should lie side by side."""
    packs = []
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.product is None:
            for kind in ("weight", "bias"):
                members = [getattr(module.get_submodule(name), kind) for name in module.packed]
                if members and all(isinstance(member, nn.Parameter) for member in members):
                    packs.append(Pack(module, kind, tuple(members)))
    return packs


def by_kind(named: Named, packs: Iterable[Pack]) -> list[Named]:
    """Cut a set of parameters by (dtype, device, trainable), each ordered so that packs lie side by side."""
    kinds: dict[tuple[torch.dtype, torch.device, bool], Named] = {}
    for name, parameter in named.items():
        kinds.setdefault((parameter.dtype, parameter.device, parameter.requires_grad), {})[name] = parameter
    partners = {id(member): pack.members for pack in packs for member in pack.members}
    ordered = []
    for members in kinds.values():
        names = {id(parameter): name for name, parameter in members.items()}
        found: Named = {}
        for parameter in members.values():
            for partner in partners.get(id(parameter), (parameter,)):
                if id(partner) in names:
                    found[names[id(partner)]] = partner
        ordered.append(found)
    return ordered
