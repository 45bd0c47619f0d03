"""Diversity by clustering: k-means on embeddings, and every cluster gives its most typical examples in turn."""

from torch import Tensor

from hanlin.align.selection.clusters import k_means
from hanlin.align.selection.decisions import Decision, Selection, check_count


def select_diverse(points: Tensor, keep: int, *, clusters: int, seed: int = 0) -> Selection:
    """points (n, d). Turn by turn each cluster gives the example nearest to its centre, until there are `keep`.

    The score is the distance to the cluster's centre.
    """
    check_count(keep, len(points))
    labels, centres = k_means(points, clusters, seed=seed)
    distance = (points.double() - centres[labels]).norm(dim=1).tolist()
    turn = [0] * len(points)
    sizes = [0] * clusters
    for place in sorted(range(len(points)), key=lambda p: (distance[p], p)):
        sizes[int(labels[place])] += 1
        turn[place] = sizes[int(labels[place])]
    order = sorted(range(len(points)), key=lambda p: (turn[p], int(labels[p])))
    kept = set(order[:keep])
    decisions = [
        Decision(p in kept, distance[p], f"{turn[p]} of {sizes[int(labels[p])]} nearest to centre {int(labels[p])}")
        for p in range(len(points))
    ]
    return Selection(decisions, facts=(f"{clusters} clusters of {min(sizes)} to {max(sizes)}",))
