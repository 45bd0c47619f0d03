"""k-means (Lloyd, k-means++ starts) and principal components, in a few lines of torch."""

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive

ROUNDS = 100


def k_means(points: Tensor, k: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """points (n, d) -> (cluster of each (n,), centres (k, d)). No cluster is empty, unless points are equal.

    k larger than n is a `HanlinError`.
    """
    if not 1 <= k <= len(points):
        raise HanlinError(f"{k} clusters of {len(points)} examples cannot be; it must be 1 to {len(points)}.")
    points = points.double()
    centres = _spread(points, k, torch.Generator().manual_seed(derive(seed, "k-means")))
    labels = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        distance, found = torch.cdist(points, centres).min(1)
        counts = found.bincount(minlength=k)
        for empty in (counts == 0).nonzero().flatten().tolist():  # it takes the point that is served worst
            far = int(distance.argmax())
            found[far], distance[far] = empty, 0.0
        if torch.equal(found, labels):
            break
        labels = found
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        counts = labels.bincount(minlength=k)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return labels, centres


def principal_components(points: Tensor, share: float = 0.95) -> Tensor:
    """points (n, d) in the fewest directions that hold `share` of their variance: (n, c), centred."""
    centred = points.double() - points.double().mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    held = values.square().cumsum(0)
    count = int((held < share * held[-1]).sum()) + 1
    return left[:, :count] * values[:count]


def _spread(points: Tensor, k: int, chances: torch.Generator) -> Tensor:
    """k-means++: each next centre is drawn with the square of its distance to those before."""
    chosen = [int(torch.randint(len(points), (1,), generator=chances))]
    squared = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < k:
        weights = squared if squared.sum() > 0 else torch.ones_like(squared)
        chosen.append(int(torch.multinomial(weights, 1, generator=chances)))
        squared = torch.minimum(squared, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]
