"""The learning-rate range test: train for a hundred steps while the rate grows, and look where the loss falls fastest
(Smith, arXiv:1506.01186, section 3.3; the exponential rates and the smoothed loss are Gugger's and fastai's).

    rate_i = low * (high / low)^(i / (n - 1))
    smoothed_i = (sum over j <= i of beta^(i-j) loss_j) / (sum of beta^(i-j))

The suggestion is the rate of the steepest fall of the smoothed loss over log rate. It is a start, not an optimum: a
short run says nothing of warm-up, decay and thousands of steps. The test changes weights and optimiser: run it inside
`train.saving.untouched`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_path

INK, GREY, BLUE, ORANGE = "#24292f", "#8c959f", "#2f6fb2", "#d9822b"


@dataclass(frozen=True)
class RangeTest:
    """rates, losses, smoothed: of each step that was made. suggestion: the rate of the steepest fall; best: the rate
    with the lowest smoothed loss; diverged: whether the test ended because the loss rose too far."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float
    best: float
    diverged: bool


def exponential_rates(low: float, high: float, steps: int) -> list[float]:
    """`steps` rates from low to high, each the same factor above the one before."""
    if not 0 < low < high < math.inf or steps < 10:
        raise HanlinError(f"A range test needs 0 < low < high and 10 steps; found {low:g}, {high:g} and {steps}.")
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def smooth(losses: list[float], beta: float) -> list[float]:
    """The mean of all losses so far, weighted by beta^age."""
    value = weight = 0.0
    found = []
    for loss in losses:
        value, weight = beta * value + loss, beta * weight + 1
        found.append(value / weight)
    return found


def range_test(
    step: Callable[[int, float], float],
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
    beta: float = 0.9,
    stop: float = 3.0,
) -> RangeTest:
    """Call `step(number, rate)` with growing rates: it makes one training step and returns the loss before it.

    It ends early where the smoothed loss rises above its minimum by `stop` times the largest fall so far, but at least
    by a tenth of the first loss, or is not finite.

    `HanlinError` where the loss never falls, so that nothing can be suggested.
    """
    if not 0 <= beta < 1 or stop <= 0:
        raise HanlinError(f"A range test needs 0 <= beta < 1 and stop > 0; found {beta} and {stop}.")
    losses: list[float] = []
    rates: list[float] = []
    diverged = False
    for number, rate in enumerate(exponential_rates(low, high, steps)):
        loss = step(number, rate)
        if not math.isfinite(loss):
            diverged = True
            break
        rates.append(rate)
        losses.append(loss)
        smoothed = smooth(losses, beta)
        lowest = min(smoothed)
        if smoothed[-1] - lowest > max(stop * (smoothed[0] - lowest), 0.1 * abs(smoothed[0])):
            diverged = True
            break
    smoothed = smooth(losses, beta)
    best = smoothed.index(min(smoothed)) if smoothed else 0
    steepest = _steepest(rates[: best + 1], smoothed[: best + 1])
    if steepest is None:
        raise HanlinError(
            f"The loss did not fall at any rate between {low:g} and {rates[-1] if rates else low:g} "
            f"({len(rates)} steps): no rate can be suggested. Lower `low`, take more steps, or look at the data."
        )
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed), rates[steepest], rates[best], diverged)


def draw_range_test(found: RangeTest, path: Path) -> None:
    """A PNG: loss and smoothed loss over the rate, with the suggestion."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color=GREY, linewidth=0.8, label="loss")
    axes.plot(found.rates, found.smoothed, color=BLUE, linewidth=1.6, label="smoothed")
    axes.axvline(found.suggestion, color=ORANGE, linewidth=1.2, label=f"steepest fall: {found.suggestion:.2g}")
    axes.axvline(found.best, color=ORANGE, linewidth=1.0, linestyle=":", label=f"lowest loss: {found.best:.2g}")
    axes.set_xscale("log")
    low, first = min(found.smoothed), found.smoothed[0]
    axes.set_ylim(low - 0.1 * (first - low), first + 0.6 * (first - low))
    axes.set_xlabel("learning rate", fontsize=9, color=INK)
    axes.set_ylabel("loss", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _steepest(rates: list[float], smoothed: list[float]) -> int | None:
    """Where the smoothed loss falls fastest over log rate: the middle of the steepest tenth; None: nowhere."""
    span = max(1, len(rates) // 10)
    slopes = [
        (smoothed[i + span] - smoothed[i]) / math.log(rates[i + span] / rates[i]) for i in range(len(rates) - span)
    ]
    if not slopes or min(slopes) >= 0:
        return None
    return slopes.index(min(slopes)) + span // 2
