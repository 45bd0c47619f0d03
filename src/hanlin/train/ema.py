"""An exponential moving average of the weights (arXiv:1412.6980, section 7.2), for evaluation and export.

    a <- d a + (1 - d) w      after each optimizer step
    d  = min(decay, (1 + n) / (10 + n))     with warm-up: the n-th update, so that the first weights are soon forgotten

Element by element, so it works on whole parameters as on the flat shares of them that a rank of ZeRO owns. The average
is fp32 (fp64 for fp64 weights): at decay 0.9999 a step changes it by less than bf16 can hold.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.wide import wide

UPDATES = "updates"  # the name of the count among the tensors of a state


class EMA:
    """The averages of named weights, beginning as the weights themselves."""

    @torch.no_grad()
    def __init__(self, weights: Mapping[str, Tensor], decay: float, *, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise HanlinError(f"The decay of an average of weights lies between 0 and 1; found {decay}.")
        self.weights, self.decay, self.warmup = dict(weights), decay, warmup
        self.averages = {name: wide(w.detach()).clone() for name, w in self.weights.items()}
        self.updates = 0

    def next_decay(self) -> float:
        """What the next update uses."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step that was made."""
        averages = list(self.averages.values())
        if averages:
            torch._foreach_lerp_(averages, [wide(w.detach()) for w in self.weights.values()], 1 - self.next_decay())
        self.updates += 1

    @contextmanager
    def swapped(self) -> Generator[None]:
        """The weights are the averages inside, in place, and afterwards bit for bit what they were."""
        kept = {name: w.detach().clone() for name, w in self.weights.items()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(kept)

    def state(self) -> dict[str, Tensor]:
        """{NAME: average, ..., "updates": their number}, by reference."""
        return {**self.averages, UPDATES: torch.tensor(self.updates)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave; other names or shapes are a `HanlinError`."""
        other = sorted((self.averages.keys() | {UPDATES}) ^ tensors.keys())
        if other:
            raise HanlinError(f"The checkpoint's averages of the weights differ from the model's: {other[:5]}.")
        for name, average in self.averages.items():
            if average.shape != tensors[name].shape:
                found, wanted = list(tensors[name].shape), list(average.shape)
                raise HanlinError(f"The average of {name} is {found} in the checkpoint, {wanted} in the model.")
            average.copy_(tensors[name])
        self.updates = int(tensors[UPDATES])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.detach().copy_(values[name])
