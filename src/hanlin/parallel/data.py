"""Data parallelism: every replica holds all weights and reads its own rows; gradients are summed (arXiv:2006.15704).

    backward   layer 4 ──▶ layer 3 ──▶ layer 2 ──▶ layer 1
                    └─ bucket 1 full: all-reduce ───▶ │
                                  └─ bucket 2 full: all-reduce ──▶ │ finish

Gradients are views of flat buckets. In the backward of the last micro-batch a bucket leaves as soon as it and those
before it are full, and the sum is made while earlier layers still compute.

Sent a step: one all-reduce a bucket, together P numbers of the parameters' dtype: P = trainable parameters, no padding,
whatever the number of micro-batches.
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.parallel.flat import Flat, Gradients, InOrder, Named, Place, by_kind

BUCKET = 25 * 2**20  # bytes: torch's own DDP takes as many


class DataParallel:
    """The `Replication` in which nothing is shared. named: parameters by name, frozen ones are left alone; group: the
    replicas, None for this process alone (then a parameter that was not used keeps no gradient)."""

    def __init__(self, named: Named, group: dist.ProcessGroup | None) -> None:
        self.pieces: dict[str, nn.Parameter] = {name: p for name, p in named.items() if p.requires_grad}
        self.ranges = {name: (0, p.numel()) for name, p in self.pieces.items()}
        self._group = group
        self._flats = [] if group is None else make_buckets(self.pieces)
        self._gradients = [Gradients(flat, keep=True) for flat in self._flats]
        self._works: list[Any] = []
        self._order = InOrder(self._flats, self._start)
        self._live = False
        self._handles = [
            place.parameter.register_post_accumulate_grad_hook(partial(self._arrived, number, place))
            for number, flat in enumerate(self._flats)
            for place in flat.places
        ]

    def begin(self) -> None:
        """Gradients become empty; the buckets' memory stays for the next."""
        self._works.clear()
        self._order.reset()
        for gradients in self._gradients:
            gradients.drop(memory=False)
        for piece in self.pieces.values():
            piece.grad = None

    @contextmanager
    def last(self) -> Generator[None]:
        """Inside, a full bucket is summed at once. One backward only."""
        self._live = True
        try:
            yield
        finally:
            self._live = False

    def finish(self) -> None:
        """Sum what has not left yet, and wait."""
        self._order.flush()
        for work in self._works:
            work.wait()
        self._works.clear()

    def publish(self) -> None:
        """Nothing: every rank made the same step."""

    @contextmanager
    def whole(self) -> Generator[None]:
        """They are, always."""
        yield

    def close(self) -> None:
        """Take the hooks off, and the gradients."""
        for handle in self._handles:
            handle.remove()
        for gradients in self._gradients:
            gradients.drop(memory=True)

    def _arrived(self, number: int, place: Place, _: Any) -> None:
        if self._order.started(number):
            raise HanlinError(
                f"A second gradient of {place.name} came after its bucket had left: inside `last()` there can be one "
                "backward only, the last of the step. Run the others before it."
            )
        self._gradients[number].take(place)
        if self._live:
            self._order.arrived(number)

    def _start(self, number: int) -> None:
        buffer = self._gradients[number].complete()
        self._works.append(dist.all_reduce(buffer, group=self._group, async_op=True))


def make_buckets(named: Named) -> list[Flat]:
    """Flat buckets of about `BUCKET` bytes, in the order in which backward reaches the parameters: the last first."""
    flats = []
    for kind in by_kind(named, ()):
        bucket: Named = {}
        size = 0
        for name, parameter in reversed(kind.items()):
            if bucket and size + parameter.nbytes > BUCKET:
                flats.append(Flat(bucket))
                bucket, size = {}, 0
            bucket[name] = parameter
            size += parameter.nbytes
        flats.append(Flat(bucket))
    return flats
