"""CaR, clustering and ranking (arXiv:2402.18191): the best of all, and the best of every kind.

kept = { top n1 by quality }  +  { top n2 of each of k clusters },     k = sqrt(n / 2), on 95 % of the variance
"""

import math
from collections.abc import Sequence

from torch import Tensor

from hanlin.align.selection.clusters import k_means, principal_components
from hanlin.align.selection.decisions import Decision, Selection, check_count, ranked


def select_car(
    quality: Sequence[float], embeddings: Tensor, *, best: int = 1000, each: int = 1, share: float = 0.95, seed: int = 0
) -> Selection:
    """quality (n), embeddings (n, d). best: n1; each: n2; share: of the variance that is clustered."""
    check_count(best, len(quality))
    clusters = max(1, int(math.sqrt(len(quality) / 2)))
    labels = k_means(principal_components(embeddings, share), clusters, seed=seed)[0].tolist()
    seen = [0] * clusters
    decisions: dict[int, Decision] = {}
    for rank, place in enumerate(ranked(quality), start=1):
        label = labels[place]
        seen[label] += 1
        kept = rank <= best or seen[label] <= each
        where = f"rank {rank} of {len(quality)}, {seen[label]} of cluster {label}"
        decisions[place] = Decision(kept, quality[place], f"quality {quality[place]:.4g}, {where}")
    return Selection([decisions[place] for place in range(len(quality))], facts=(f"{clusters} clusters",))
