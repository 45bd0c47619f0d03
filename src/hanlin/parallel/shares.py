"""One flat buffer of parameters of which every rank of a group owns an equal share, and the shares' gradients.

    buffer   | rank 0 | rank 1 | rank 2 | rank 3 |        whole, or only this rank's share with the rest given back
                       └─ pieces: what of each parameter lies in this rank's share, flat

The parameters are views of the buffer for good. Giving it back empties the memory below them (`resize_` of the
storage): what autograd kept of the parameters for the backward is there again when the buffer is.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hanlin.parallel.flat import Flat, Gradients, Pack


class Share:
    """Weights and gradients of a `Flat` over a group.

    apart: the share is a copy, so that the buffer can be given back; else the pieces are views of the buffer. keep: as
    `Gradients`. here: whether the buffer is whole, once `wait` was called.
    """

    def __init__(
        self, flat: Flat, packs: list[Pack], group: dist.ProcessGroup, *, apart: bool, keep: bool = False
    ) -> None:
        self.flat, self.group = flat, group
        rank = dist.get_rank(group)
        self.whole = flat.lay(packs)
        self._own = slice(rank * flat.share, (rank + 1) * flat.share)
        self._apart, self._bytes = apart, self.whole.untyped_storage().nbytes()
        self.mine = self.whole[self._own].clone() if apart else self.whole[self._own]
        self.here = True
        self._gathering: Any = None
        self.gradients = Gradients(flat, keep=keep)
        self._reducing: list[tuple[Any, Tensor, Tensor]] = []  # work, its result, its input
        self._sum: Tensor | None = None
        self.reduced = False  # in this step
        self.pieces: dict[str, nn.Parameter] = {}
        self.frozen: dict[str, Tensor] = {}  # as `pieces`, of what is not trained
        self.ranges: dict[str, tuple[int, int]] = {}
        self._cuts: dict[str, slice] = {}  # of a piece in the share
        for place, start, stop in flat.pieces(rank):
            first = place.start + start - self._own.start
            self.ranges[place.name] = start, stop
            if flat.trainable:
                self._cuts[place.name] = slice(first, first + stop - start)
                self.pieces[place.name] = nn.Parameter(self.mine[self._cuts[place.name]])
            else:
                self.frozen[place.name] = self.mine[first : first + stop - start]

    # --- weights ---

    def start_gathering(self) -> None:
        """Begin to make the buffer whole from the shares: an all-gather of `flat.size` numbers."""
        if self._apart:
            if self.here:
                return
            self.whole.untyped_storage().resize_(self._bytes)
        self.here = True
        # `data`: autograd must not count this as a change of what it has kept
        self._gathering = gather(self.whole.data, self.mine.data, self.group)

    def wait(self) -> None:
        """Until what was begun is done."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def give_back(self) -> None:
        """The memory of the buffer, if the share is a copy."""
        if self._apart and self.here:
            self.wait()
            self.whole.untyped_storage().resize_(0)
            self.here = False

    @torch.no_grad()
    def take_over(self) -> None:
        """What was written into the whole parameters, gets into the share."""
        if self._apart:
            self.mine.copy_(self.whole[self._own])

    @property
    def intact(self) -> bool:
        """Whether the parameters still are views of the buffer."""
        storage = self.whole.untyped_storage()._cdata
        return all(place.parameter.untyped_storage()._cdata == storage for place in self.flat.places)

    # --- gradients ---

    @property
    def waiting(self) -> bool:
        """Whether there are gradients that no sum was begun of."""
        return not self.gradients.empty or any(place.parameter.grad is not None for place in self.flat.places)

    def clear(self) -> None:
        """Before a step."""
        self.settle()
        self._sum, self.reduced = None, False
        self.gradients.drop(memory=True)
        for piece in self.pieces.values():
            piece.grad = None

    def start_reducing(self) -> None:
        """Begin to sum what has gathered since the last time over the ranks: a reduce-scatter of `flat.size` numbers.
        The whole gradients are given away."""
        self.reduced = True
        buffer = self.gradients.complete()
        mine = buffer.new_empty(self.flat.share)
        self._reducing.append((reduce(mine, buffer, self.group), mine, buffer))
        self.gradients.drop(memory=True)

    def settle(self) -> None:
        """Wait for sums that were begun, and add them up."""
        for work, mine, _ in self._reducing:
            work.wait()
            self._sum = mine if self._sum is None else self._sum.add_(mine)
        self._reducing.clear()

    def hand_over(self) -> None:
        """Each piece gets its gradient."""
        self.settle()
        if self._sum is None and self.pieces:
            self._sum = self.mine.new_zeros(self.flat.share)
        for name, piece in self.pieces.items():
            assert self._sum is not None
            piece.grad = self._sum[self._cuts[name]]


def gather(whole: Tensor, mine: Tensor, group: dist.ProcessGroup) -> Any:
    """Begin: whole (n * share,) becomes the ranks' `mine` (share,), which may be a part of it -> what to wait for."""
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    return call(whole, mine, group=group, async_op=True)


def reduce(mine: Tensor, whole: Tensor, group: dist.ProcessGroup) -> Any:
    """Begin: mine (share,) becomes this rank's part of the ranks' sum of `whole` -> what to wait for."""
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return call(mine, whole, group=group, async_op=True)
