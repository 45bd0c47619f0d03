"""Dynamic loss scaling: what keeps small gradients alive in fp16 (arXiv:1710.03740, section 3.2).

fp16 ends at 6e-8 below and 65,504 above. The loss is multiplied by a scale s before the backward pass, so that small
gradients do not become zero, and the fp32 gradients of the master weights are divided by s before they are used.

    some gradient is inf or NaN   s <- s / 2, and the step is not made
    N steps without one           s <- 2 s

Ranks must agree: if one skipped a step that the others make, their weights would part. A trainer looks at the norm of
the whole gradient, which every rank has alike and which overflows when any number does.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError


class LossScale:
    """The scale, and when it changes. A value of plain numbers: the same flags give the same scales.

    interval: steps without an overflow after which it grows. smallest: below it the run is stopped, since gradients
    that overflow at any scale are not finite to begin with.
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        *,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        smallest: float = 2.0**-10,
    ) -> None:
        if scale <= 0 or growth <= 1 or not 0 < backoff < 1 or interval < 1:
            raise HanlinError(
                f"A loss scale needs scale > 0, growth > 1, 0 < backoff < 1 and interval > 0; found {scale}, {growth}, "
                f"{backoff}, {interval}."
            )
        self.scale, self.growth, self.backoff, self.interval, self.smallest = scale, growth, backoff, interval, smallest
        self.good = 0  # steps since the last change
        self.skipped = 0  # steps of the whole run that were not made

    def update(self, overflowed: bool) -> None:
        """Tell it how a step went. `HanlinError` where the scale has become useless."""
        if not overflowed:
            self.good += 1
            if self.good == self.interval:
                self.scale, self.good = self.scale * self.growth, 0
            return
        self.scale, self.good, self.skipped = self.scale * self.backoff, 0, self.skipped + 1
        if self.scale < self.smallest:
            raise HanlinError(
                f"The loss scale of fp16 fell to {self.scale:g}: gradients overflow at any scale. Something is not "
                "finite before the backward pass, or the rate is too high. Try train.precision bf16, or a lower lr."
            )

    def state(self) -> dict[str, float]:
        """JSON values for a checkpoint."""
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load(self, state: dict[str, float]) -> None:
        """Take over what `state` gave."""
        self.scale, self.good, self.skipped = float(state["scale"]), int(state["good"]), int(state["skipped"])


@torch.no_grad()
def unscale_gradients(parameters: Iterable[Tensor], scale: float) -> Tensor:
    """Divide the gradients of `parameters` by `scale`, in place -> a flag (), fp32: 1 where one was inf or NaN, else 0.

    The flag is on the gradients' device, and looking at it waits. After an overflow the gradients mean nothing.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    places = {g.device for g in gradients}
    if len(places) > 1:
        raise HanlinError(f"Gradients to unscale lie on several devices: {sorted(map(str, places))}.")
    found = torch.zeros((), device=places.pop() if places else None)
    for dtype in {g.dtype for g in gradients}:
        members = [g for g in gradients if g.dtype == dtype]
        inverse = torch.full((), 1.0 / scale, device=found.device)
        torch._amp_foreach_non_finite_check_and_unscale_(members, found, inverse)
    return found
