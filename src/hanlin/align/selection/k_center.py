"""K-Center-Greedy (Gonzalez 1985; arXiv:1708.00489): the next kept example is the one farthest from all kept so far.

    argmax_i min_{j in S} |x_i - x_j|

Every example then lies within a radius of a kept one that is at most twice the smallest possible.
"""

import torch
from torch import Tensor

from hanlin.align.selection.decisions import Decision, Selection, check_count


def k_center_greedy(points: Tensor, keep: int, *, start: int | None = None) -> tuple[list[int], Tensor, Tensor]:
    """points (n, d) -> (centres in the order taken, distance (n,) to the nearest of them, which of them it is (n,)).

    start: the first centre; None: the point nearest to the mean. Equal distances: the earlier point.
    """
    check_count(keep, len(points))
    points = points.double()
    first = int((points - points.mean(0)).norm(dim=1).argmin()) if start is None else start
    centres = [first]
    distance = (points - points[first]).norm(dim=1)
    nearest = torch.full((len(points),), first)
    while len(centres) < keep:
        new = int(distance.argmax())
        if distance[new] == 0:  # only copies of centres are left
            taken = set(centres)
            new = next(place for place in range(len(points)) if place not in taken)
        centres.append(new)
        to_new = (points - points[new]).norm(dim=1)
        nearest[to_new < distance] = new
        distance = torch.minimum(distance, to_new)
    return centres, distance, nearest


def select_k_center(points: Tensor, keep: int, names: list[str]) -> Selection:
    """Scores are distances to the nearest kept example; names: of the examples, for the reasons."""
    centres, distance, nearest = k_center_greedy(points, keep)
    order = {place: number for number, place in enumerate(centres, start=1)}
    decisions = [
        Decision(True, 0.0, f"centre {order[place]} of {keep}")
        if place in order
        else Decision(False, float(far), f"{float(far):.4g} from {names[int(nearest[place])]}, which is kept")
        for place, far in enumerate(distance)
    ]
    radius = float(distance.max())
    return Selection(decisions, facts=(f"radius {radius:.4g}: every example is that near to a kept one",))
