"""What every method answers with: kept or not, by which score, why; and the rules that several share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hanlin.core.errors import HanlinError


@dataclass(frozen=True)
class Decision:
    """Of one example. score: None where it could not be judged (then it is not kept)."""

    kept: bool
    score: float | None
    reason: str


@dataclass(frozen=True)
class Selection:
    """A decision for every example, in order. threshold: the score that parts kept from dropped, where one does.
    facts: what else the run has to say, a line each."""

    decisions: list[Decision]
    threshold: float | None = None
    facts: tuple[str, ...] = ()

    @property
    def kept(self) -> list[int]:
        return [place for place, decision in enumerate(self.decisions) if decision.kept]


def keep_top(scores: Sequence[float | None], keep: int, *, named: str, unjudged: str = "no score") -> Selection:
    """The `keep` highest scores; of equal ones the earlier. named: what the score is, for the reasons."""
    order = ranked(scores)
    check_count(keep, len(order))
    rank = {place: number for number, place in enumerate(order, start=1)}
    decisions = [
        Decision(False, None, unjudged)
        if score is None
        else Decision(rank[place] <= keep, score, f"{named} {score:.4g}, rank {rank[place]} of {len(order)}")
        for place, score in enumerate(scores)
    ]
    return Selection(decisions, scores[order[keep - 1]])


def keep_above(scores: Sequence[float | None], least: float, *, named: str, unjudged: str = "no score") -> Selection:
    """All scores of at least `least`."""
    decisions = [
        Decision(False, None, unjudged)
        if score is None
        else Decision(score >= least, score, f"{named} {score:.4g} {'>=' if score >= least else '<'} {least:g}")
        for score in scores
    ]
    best = max((score for score in scores if score is not None), default=math.nan)
    none = () if best >= least else (f"no {named} reaches {least:g}; the highest is {best:.4g}",)
    return Selection(decisions, least, none)


def ranked(scores: Sequence[float | None]) -> list[int]:
    """Places by score, best first, those without one left out; of equal ones the earlier. NaN is refused."""
    judged = [(score, place) for place, score in enumerate(scores) if score is not None]
    if broken := [place for score, place in judged if math.isnan(score)]:
        raise HanlinError(f"The score of example {broken[0] + 1} is NaN; every score must be a number.")
    return [place for score, place in sorted(judged, key=lambda pair: (-pair[0], pair[1]))]


def check_count(keep: int, examples: int) -> None:
    """Not more than there are, and at least one."""
    if not 1 <= keep <= examples:
        raise HanlinError(f"{keep} are to be kept of {examples} examples; it must be between 1 and {examples}.")
