"""Which bytes live: every storage is entered when an operation makes it and struck out when Python gives it back.

A storage belongs to the part of the step that made it (forward, loss, backward, optimiser) until something says better:
parameters and what the optimiser keeps are told by `own`, gradients by a hook where they arrive.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

CATEGORIES = ("weights", "gradients", "optimiser", "activations", "loss", "buffers", "communication", "cache")
OF_STAGE = {"build": "buffers", "forward": "activations", "loss": "loss", "backward": "buffers", "optimiser": "buffers"}


@dataclass(frozen=True)
class Interval:
    """What happened to the bytes between two cuts: change, from its begin to its end, and spike, from its begin to its
    fullest moment, both by category; high: the spike's sum."""

    name: str
    change: Counter[str]
    spike: Counter[str]
    high: int


@dataclass
class _Entry:
    size: int
    category: str


class Ledger:
    """granule: sizes are rounded up to its multiples, as the allocator does (512 bytes on CUDA).

    held: bytes now by category; peak: the most at once since `restart`, peak_by: what they were.
    """

    def __init__(self, granule: int = 1) -> None:
        self.granule = granule
        self.stage = "build"
        self.held: Counter[str] = Counter()
        self.total = 0
        self._living: dict[int, _Entry] = {}
        self._watch: dict[int, weakref.ref] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the peak."""
        self.peak, self.peak_by, self.peak_stage = self.total, Counter(self.held), self.stage
        self.phase_peaks: dict[str, int] = {}
        self.intervals: list[Interval] = []
        self._begin()

    def cut(self, name: str) -> None:
        """End the interval that began at the last cut, and name it."""
        change, spike = Counter(self.held), Counter(self._top_by)
        change.subtract(self._start_by)
        spike.subtract(self._start_by)
        self.intervals.append(Interval(name, change, spike, self._top - self._start))
        self._begin()

    def _begin(self) -> None:
        self._start, self._start_by = self.total, Counter(self.held)
        self._top, self._top_by = self.total, self._start_by

    def note(self, out: Any, func: Any = None, args: Any = ()) -> None:
        """Enter what an operation gave back, as far as it is new."""
        for x in tree_iter(out):
            if isinstance(x, Tensor) and not x.is_meta:
                self._enter(x, func, args)

    def moment(self, size: int) -> None:
        """So many bytes are needed for as long as one operation runs."""
        self._look(size)

    def own(self, tensors: Iterable[Tensor], category: str) -> None:
        """These tensors' storages belong to the category."""
        for x in tensors:
            entry = self._living.get(x.untyped_storage()._cdata)
            if entry is not None and entry.category != category:
                self.held[entry.category] -= entry.size
                self.held[category] += entry.size
                entry.category = category

    def follow_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """From now on, what arrives in `.grad` of these is a gradient."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.own([parameter.grad], "gradients")

    def _enter(self, x: Tensor, func: Any, args: Any) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._living:
            return
        size = -(-storage.nbytes() // self.granule) * self.granule
        category = OF_STAGE[self.stage]
        if self.stage == "backward" and torch.is_grad_enabled():  # a layer is run again
            category = "activations"
        self._living[key] = _Entry(size, category)
        self._watch[key] = weakref.ref(storage, lambda _, key=key: self._strike(key))
        self.held[category] += size
        self.total += size
        self._look(0)

    def _strike(self, key: int) -> None:
        entry = self._living.pop(key)
        self._watch.pop(key)
        self.held[entry.category] -= entry.size
        self.total -= entry.size

    def _look(self, more: int) -> None:
        now = self.total + more
        self.phase_peaks[self.stage] = max(now, self.phase_peaks.get(self.stage, 0))
        if now <= self._top and now <= self.peak:
            return
        held = Counter(self.held)
        held["buffers"] += more
        if now > self._top:
            self._top, self._top_by = now, held
        if now > self.peak:
            self.peak, self.peak_by, self.peak_stage = now, held, self.stage
