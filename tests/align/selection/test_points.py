"""K-Center, clusters, CaR and diversity on random points, each against a brute-force twin."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from hanlin.align.selection.car import select_car
from hanlin.align.selection.clusters import k_means, principal_components
from hanlin.align.selection.diversity import select_diverse
from hanlin.align.selection.k_center import k_center_greedy, select_k_center
from hanlin.core.errors import HanlinError


def cloud(seed: int, n: int, d: int = 3) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def radius_of(points, centres) -> float:
    return max(min(math.dist(p, points[c]) for c in centres) for p in points)


@pytest.mark.parametrize("seed", range(12))
def test_k_center_is_within_twice_the_optimum_of_all_subsets(seed):
    n, k = 6 + seed % 7, 1 + seed % 4
    points = cloud(seed, n, 2)
    centres, distance, nearest = k_center_greedy(points, k)
    listed = points.tolist()
    best = min(radius_of(listed, subset) for subset in combinations(range(n), k))
    assert len(set(centres)) == k
    assert float(distance.max()) == pytest.approx(radius_of(listed, centres))
    assert float(distance.max()) <= 2 * best + 1e-12
    for place, centre in enumerate(nearest.tolist()):
        assert math.dist(listed[place], listed[centre]) == pytest.approx(float(distance[place]))


def test_k_center_takes_what_is_farthest_each_time():
    points = cloud(5, 40)
    centres, _, _ = k_center_greedy(points, 12, start=7)
    for number in range(1, 12):
        apart = torch.cdist(points, points[centres[:number]]).min(1).values
        assert centres[number] == int(apart.argmax())


def test_k_center_keeps_as_many_as_asked_even_of_copies():
    selection = select_k_center(torch.ones(5, 2), 3, list("abcde"))
    assert len(selection.kept) == 3
    assert [d.reason for d in selection.decisions if not d.kept] == ["0 from a, which is kept"] * 2


def test_k_means_ends_where_every_point_is_with_the_nearest_mean():
    points = cloud(1, 90)
    labels, centres = k_means(points, 7, seed=3)
    assert torch.equal(labels, torch.cdist(points, centres).argmin(1))
    for cluster in range(7):
        torch.testing.assert_close(centres[cluster], points[labels == cluster].mean(0))
    assert torch.equal(k_means(points, 7, seed=3)[0], labels)


def test_k_means_of_as_many_clusters_as_points_and_of_far_groups():
    points = cloud(2, 9)
    assert sorted(k_means(points, 9)[0].tolist()) == list(range(9))
    groups = torch.cat([cloud(3, 20) + 50, cloud(4, 20) - 50])
    labels = k_means(groups, 2)[0].tolist()
    assert len(set(labels[:20])) == len(set(labels[20:])) == 1 and labels[0] != labels[-1]
    with pytest.raises(HanlinError, match="10 clusters of 9 examples"):
        k_means(points, 10)


def test_principal_components_hold_the_share_of_numpys_covariance():
    points = cloud(6, 200, 6) * torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.1])
    reduced = principal_components(points, 0.95)
    values = np.sort(np.linalg.eigvalsh(np.cov(points.numpy().T)))[::-1]
    count = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.95)) + 1
    assert reduced.shape == (200, count)
    np.testing.assert_allclose(np.var(reduced.numpy(), axis=0, ddof=1), values[:count], rtol=1e-9)


@pytest.mark.parametrize(("best", "each"), [(5, 1), (1, 2), (12, 0)])
def test_car_is_the_union_of_the_papers_two_sets(best, each):
    n = 60
    quality = cloud(8, n, 1)[:, 0].tolist()
    embeddings = cloud(7, n, 8) * torch.tensor([3.0, 2.5, 2, 1.5, 1, 1, 1, 1])
    selection = select_car(quality, embeddings, best=best, each=each, share=0.6, seed=5)
    k = int(math.sqrt(n / 2))
    labels = k_means(principal_components(embeddings, 0.6), k, seed=5)[0].tolist()
    wanted = set(sorted(range(n), key=lambda i: -quality[i])[:best])
    for cluster in range(k):
        members = [i for i in range(n) if labels[i] == cluster]
        wanted |= set(sorted(members, key=lambda i: -quality[i])[:each])
    assert set(selection.kept) == wanted
    assert len({labels[i] for i in selection.kept}) == k or each == 0


def test_diversity_goes_round_the_clusters():
    points = cloud(9, 50)
    selection = select_diverse(points, 12, clusters=5, seed=2)
    labels, centres = k_means(points, 5, seed=2)
    distance = (points - centres[labels]).norm(dim=1)
    counts = labels[selection.kept].bincount(minlength=5)
    sizes = labels.bincount(minlength=5)
    assert len(selection.kept) == 12
    assert all(2 <= int(c) <= 3 for c, size in zip(counts, sizes, strict=True) if size > 3)
    for cluster in range(5):
        inside = (labels == cluster).nonzero().flatten().tolist()
        nearest = sorted(inside, key=lambda i: float(distance[i]))[: int(counts[cluster])]
        assert set(nearest) == set(selection.kept) & set(inside)


def test_more_than_there_are_is_refused():
    for select in (lambda: k_center_greedy(cloud(0, 4), 5), lambda: select_diverse(cloud(0, 4), 5, clusters=2)):
        with pytest.raises(HanlinError, match="5 are to be kept of 4 examples"):
            select()
