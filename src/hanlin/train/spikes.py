"""Loss spikes: steps whose loss or gradient norm jumps far above what the last steps had, and what is done about them.

    limit    median + k * max(1.4826 * MAD, floor * |median|)      over a window of accepted steps

MAD is the median distance from the median; 1.4826 of it is the standard deviation of a normal distribution, and unlike
that it does not grow with the spike itself. The floor is for windows in which nothing moves. A step is judged before
the optimiser moves, so a spike touches no weight. Then, as PaLM did (arXiv:2204.02311, section 5.1):

    skip        leave the step's rows out: the same optimizer step is made with the rows of the next data step
    rollback    go back to the newest checkpoint besides, and leave out the rows of the steps just before the spike,
                too: the loss of a step tells of the update before it

Which rows an optimizer step reads is a pure function of its number and of the data steps that are left out (`Skips`).
So a resumed run reads what it would have read, and a run that is rolled back reads the same rows up to the guilty ones.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from hanlin.core.errors import HanlinError

Verdict = Literal["ok", "spike"]
Action = Literal["ok", "skip", "rollback"]
NORMAL = 1.4826  # standard deviations of a normal distribution in its MAD
LOSS_FLOOR, NORM_FLOOR = 0.01, 0.1  # share of the median that counts as one deviation at least


@dataclass(frozen=True)
class Skips:
    """Data steps that are left out, sorted."""

    steps: tuple[int, ...] = ()

    def data_step(self, step: int) -> int:
        """The data step that optimizer step `step` reads (both count from 0): number `step` of those not left out."""
        found = step
        for skipped in self.steps:
            if skipped > found:
                break
            found += 1
        return found

    def add(self, *steps: int) -> "Skips":
        """With these left out, too."""
        return Skips(tuple(sorted({*self.steps, *steps})))


class SpikeDetector:
    """Judges a step by its loss and its gradient norm. window: accepted steps that are remembered; threshold: k;
    least: accepted steps before it says anything (default: half a window, at least 8)."""

    def __init__(self, window: int = 64, threshold: float = 8.0, *, least: int | None = None) -> None:
        self.least = max(8, window // 2) if least is None else least
        if not 1 <= self.least <= window or threshold <= 0:
            raise HanlinError(
                f"A spike is found with threshold > 0 in a window of at least {self.least} steps; found threshold "
                f"{threshold} and window {window}."
            )
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)

    def verdict(self, loss: float, norm: float) -> Verdict:
        """Whether this step is a spike; changes nothing. What is not finite is one."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "spike"
        high = loss > self.limit(self.losses, LOSS_FLOOR) or norm > self.limit(self.norms, NORM_FLOOR)
        return "spike" if high else "ok"

    def accept(self, loss: float, norm: float) -> None:
        """Remember a step that is made."""
        self.losses.append(loss)
        self.norms.append(norm)

    def limit(self, values: deque[float], floor: float) -> float:
        """Above this a value is a spike; infinite while too few are known."""
        if len(values) < self.least:
            return math.inf
        middle = median(values)
        spread = NORMAL * median(abs(value - middle) for value in values)
        return middle + self.threshold * max(spread, floor * abs(middle))

    def state(self) -> dict[str, list[float]]:
        """JSON for a checkpoint."""
        return {"losses": list(self.losses), "norms": list(self.norms)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for mine, kept in ((self.losses, state["losses"]), (self.norms, state["norms"])):
            mine.clear()
            mine.extend(kept)


class SpikeGuard:
    """Detector and policy of a run: which data step comes next, and what to do with the step that was computed.

    action: "skip" or "rollback". before: accepted steps in front of a spike whose rows a rollback leaves out, too.
    most: spikes after which the run stops with an error. All ranks judge the same global numbers, so they agree.
    """

    def __init__(
        self, detector: SpikeDetector, action: Literal["skip", "rollback"], *, before: int = 1, most: int = 20
    ) -> None:
        self.detector, self.action, self.before, self.most = detector, action, before, most
        self.skips = Skips()
        self.spikes = 0

    def data_step(self, step: int) -> int:
        """The data step of optimizer step `step` (from 0)."""
        return self.skips.data_step(step)

    def judge(self, step: int, loss: float, norm: float, *, oldest: int | None = None) -> Action:
        """What to do with optimizer step `step` (from 0), computed and not made yet.

        oldest: optimizer steps that are done in the checkpoint that can be gone back to; None: there is none.
        "ok": make it. "skip": do not; compute the same step again, whose data step is now another. "rollback": put that
        checkpoint back, then `load` the state that it holds; its data steps are now others. `HanlinError` after `most`.
        """
        if self.detector.verdict(loss, norm) == "ok":
            self.detector.accept(loss, norm)
            return "ok"
        self.spikes += 1
        if self.spikes > self.most:
            raise HanlinError(
                f"Step {step + 1}: the loss {loss:g} and the gradient norm {norm:g} are spike number {self.spikes} of "
                f"this run; train.spikes.most is {self.most}. Lower train.lr, warm up longer, set train.clip, or look "
                f"at the data steps that were left out: {', '.join(map(str, self.skips.steps))}."
            )
        back = self.action == "rollback" and oldest is not None
        first = max(oldest or 0, step - self.before) if back else step
        self.skips = self.skips.add(*[self.data_step(guilty) for guilty in range(first, step + 1)])
        return "rollback" if back else "skip"

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint."""
        return {**self.detector.state(), "skips": list(self.skips.steps), "spikes": self.spikes}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the window of a checkpoint. What was left out since stays left out: a rollback must not meet the
        same rows again."""
        self.detector.load(state)
        self.skips = self.skips.add(*state["skips"])
        self.spikes = max(self.spikes, state["spikes"])
