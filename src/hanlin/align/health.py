"""`Health` reads a run's lines of metrics while they are written, and says in words what goes wrong.

    row -> curves -> every rule whose metric is in the row -> Found? -> an alarm, unless it was said already

An alarm is said once; again when what was found became twice as bad, or came back after it had been fine for ten
lines. All of it is a function of the rows, so a run that goes on after a kill says what the uninterrupted one would.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanlin.align.health_conditions import Found, Line, Seen
from hanlin.align.health_rules import RULES, Rule
from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run

if TYPE_CHECKING:
    from hanlin.train.trainer import Watch

CALM = 10  # lines without a finding after which it counts as gone
WORSE = 2.0


@dataclass(frozen=True)
class Alarm:
    """What a rule found at a step of the run."""

    rule: Rule
    step: float
    found: Found

    @property
    def text(self) -> str:
        return self.rule.sentence.format(metric=self.rule.metric, **self.found.figures)


class Health:
    """`look` is the `watch` of a `Trainer`. alarms: all so far, oldest first."""

    def __init__(self, rules: Sequence[Rule] = RULES) -> None:
        self.rules = rules
        self.seen = Seen()
        self.alarms: list[Alarm] = []
        self._step = -math.inf
        self._calm = dict.fromkeys(range(len(rules)), CALM)
        self._said = dict.fromkeys(range(len(rules)), 0.0)

    @classmethod
    def over(cls, rows: Iterable[Mapping[str, Any]], rules: Sequence[Rule] = RULES) -> "Health":
        """Of lines that were written already."""
        health = cls(rules)
        for row in rows:
            health.see(row)
        return health

    @classmethod
    def resumed(cls, run: Run, rules: Sequence[Rule] = RULES) -> "Health":
        """With the lines up to the newest checkpoint of `run`, from where it goes on; without one, from nothing."""
        newest = max((step for step, _ in run.checkpoints()), default=-1)
        return cls.over((row for row in read_metrics(run.metrics) if row.get("step", 0) <= newest), rules)

    def look(self, row: Mapping[str, Any]) -> list[str]:
        """What is wrong since this line, in words; mostly nothing."""
        return [alarm.text for alarm in self.see(row)]

    def see(self, row: Mapping[str, Any]) -> list[Alarm]:
        """The same as alarms. A line of an earlier step: the run went back, what was after it did not happen."""
        step = row.get("step")
        if not isinstance(step, int | float):
            return []
        if step < self._step:
            self._go_back(step)
        self._step = step
        numbers = {
            name: float(value) for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }  # fmt: skip
        for name, value in numbers.items():
            self.seen.lines.setdefault(name, Line()).add(step, value)
        new = [alarm for place, rule in enumerate(self.rules) if rule.metric in numbers
               for alarm in self._ask(place, rule, step)]  # fmt: skip
        self.alarms += new
        return new

    def _ask(self, place: int, rule: Rule, step: float) -> list[Alarm]:
        found = rule.condition(self.seen, rule.metric, rule.rows)
        if found is None:
            self._calm[place] += 1
            return []
        back = self._calm[place] >= CALM
        self._calm[place] = 0
        if not back and found.badness < WORSE * self._said[place]:
            return []
        self._said[place] = found.badness
        return [Alarm(rule, step, found)]

    def _go_back(self, step: float) -> None:
        for line in self.seen.lines.values():
            line.forget(step)
        self.alarms = [alarm for alarm in self.alarms if alarm.step < step]
        said = {id(alarm.rule): alarm.found.badness for alarm in self.alarms}
        for place, rule in enumerate(self.rules):
            self._calm[place] = 0 if id(rule) in said else CALM
            self._said[place] = said.get(id(rule), 0.0)


def watch_of(run: Run | None) -> "Watch":
    """The `watch` of a run's wiring: `Wiring(..., watch=watch_of(parts.run))`."""
    return (Health() if run is None else Health.resumed(run)).look


def read_samples(file: Path) -> list[dict[str, Any]]:
    """The rows of a `samples.jsonl` (round, prompt, answer, finish, score, advantage, tokens); those that a run wrote
    again after it went back stand once, the newer ones."""
    if not file.is_file():
        return []
    rounds: dict[int, list[dict[str, Any]]] = {}
    last = None
    for line in file.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            number = int(row["round"])
        except (ValueError, TypeError, KeyError):  # a torn line
            continue
        if number != last:
            rounds[number] = []
        rounds[number].append(row)
        last = number
    return [row for number in sorted(rounds) for row in rounds[number]]
