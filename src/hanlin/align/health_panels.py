"""The panels of a run's health, a row each, as the figure (`health.png`) and the studio's live page draw them."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from hanlin.align.health import Alarm
from hanlin.train.history import RunHistory

Curve = list[tuple[float, float]]
LEFT_OUT = ("reward/std",)  # it matches reward/* and is none of the rewards


@dataclass(frozen=True)
class Panel:
    """metrics: names, or patterns such as `reward/*`, in the order of drawing; how: lines, or areas on top of one
    another; low, high: what the axis shows at least; limit: where an alarm begins; zero: said where all is 0."""

    title: str
    metrics: tuple[str, ...]
    how: Literal["lines", "stack"] = "lines"
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    logarithmic: bool = False
    zero: str = ""

    def shows(self, metric: str) -> bool:
        return metric not in LEFT_OUT and any(fnmatchcase(metric, pattern) for pattern in self.metrics)

    def curves(self, history: RunHistory) -> dict[str, Curve]:
        """(step, value) of each of its metrics that the run has."""
        known = history.names()
        names = dict.fromkeys(name for pattern in self.metrics for name in known if fnmatchcase(name, pattern))
        found = {name: history.curve(name) for name in names if self.shows(name)}
        return found if self.how == "lines" else filled(found)

    def alarms(self, alarms: Iterable[Alarm]) -> list[Alarm]:
        """Those of its metrics."""
        return [alarm for alarm in alarms if self.shows(alarm.rule.metric)]


def filled(curves: dict[str, Curve]) -> dict[str, Curve]:
    """All at the same steps, 0 where one has no value: what lies on top of one another."""
    steps = sorted({step for curve in curves.values() for step, _ in curve})
    by_step = {name: dict(curve) for name, curve in curves.items()}
    return {name: [(step, values.get(step, 0.0)) for step in steps] for name, values in by_step.items()}


def short_name(name: str) -> str:
    """`seconds/rollout` is `rollout`; `eval/...` keeps its head."""
    head, _, rest = name.partition("/")
    return rest if rest and head in ("seconds", "answer", "kl", "rewards", "logps", "rollout") else name


PANELS: tuple[Panel, ...] = (
    Panel("reward", ("reward", "reward/*")),
    Panel("held out", ("eval/sampled", "eval/greedy"), low=0, high=1),
    Panel("silent groups", ("groups/silent",), low=0, high=1, limit=0.8),
    Panel("entropy, nats a token", ("entropy",), low=0),
    Panel("divergence from the reference, nats", ("kl/answer", "kl/k1", "kl/k3", "kl/chosen", "kl/rejected"), low=0),
    Panel("tokens an answer", ("answer/length", "answer/length_p95", "eval/length"), low=0),
    Panel("how answers end", ("answer/ended", "answer/truncated", "answer/empty"), low=0, high=1),
    Panel("share of tokens clipped", ("clip_low", "clip_high"), low=0, zero="on-policy: nothing to clip"),
    Panel("rollout against trainer, nats", ("rollout/mismatch_p95", "rollout/mismatch"), low=0, limit=0.1),
    Panel("critic: variance explained", ("explained_variance",), high=1),
    Panel("rewards of pairs", ("rewards/chosen", "rewards/rejected", "rewards/margin")),
    Panel("pairs told apart", ("rewards/accuracy", "eval/rewards/accuracy"), low=0, high=1),
    Panel("log-probability of answers", ("logps/chosen", "logps/rejected")),
    Panel("loss", ("loss", "eval/loss")),
    Panel("loss on held-out text", ("eval_text/loss",)),
    Panel("gradient norm", ("grad_norm",), logarithmic=True),
    Panel("seconds a round", ("seconds/*",), how="stack", low=0),
    Panel("tokens a second", ("tokens_per_s",), low=0),
)
