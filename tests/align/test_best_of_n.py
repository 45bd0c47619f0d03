"""Best-of-N against enumeration of every choice of N answers."""

import itertools
import math

import pytest
import torch

from hanlin.align.best_of_n import best_of_n, best_of_n_distribution, best_of_n_kl, expected_best
from hanlin.align.samples import Prompt, Sample
from hanlin.core.errors import HanlinError


def enumerated(chances: torch.Tensor, rewards: torch.Tensor, n: int) -> torch.Tensor:
    """Every way to draw n answers, each way's best; equal rewards share by their chances."""
    found = torch.zeros_like(chances)
    for drawn in itertools.product(range(len(chances)), repeat=n):
        best = max(float(rewards[i]) for i in drawn)
        tied = [i for i in range(len(chances)) if float(rewards[i]) == best]
        weight = math.prod(float(chances[i]) for i in drawn)
        total = sum(float(chances[i]) for i in tied)
        for i in tied:
            found[i] += weight * float(chances[i]) / total
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_distribution_of_the_best_equals_enumeration(n):
    torch.manual_seed(n)
    chances = torch.softmax(torch.randn(5, dtype=torch.float64), 0)
    for rewards in (torch.randn(5, dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0]).double()):
        found = best_of_n_distribution(chances, rewards, n)
        assert torch.allclose(found, enumerated(chances, rewards, n), atol=1e-12)
        assert abs(float(found.sum()) - 1) < 1e-12


def test_the_kl_is_at_most_the_bound_and_reaches_it_where_answers_are_rare():
    torch.manual_seed(0)
    for n in (1, 2, 4, 16):
        for count in (2, 3, 10):
            p = torch.softmax(2 * torch.randn(count, dtype=torch.float64), 0)
            q = best_of_n_distribution(p, torch.randn(count, dtype=torch.float64), n)
            kl = float(torch.special.xlogy(q, q / p).sum())
            assert -1e-12 <= kl <= best_of_n_kl(n) + 1e-12
        many = torch.full((20_000,), 1 / 20_000, dtype=torch.float64)
        ranks = torch.arange(20_000, dtype=torch.float64) / 20_000
        q = (ranks + 1 / 20_000) ** n - ranks**n  # of the best of n among that many different rewards
        assert float(torch.special.xlogy(q, q / many).sum()) == pytest.approx(best_of_n_kl(n), abs=1e-3)
    assert best_of_n_kl(1) == 0


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_the_expected_best_equals_the_mean_over_all_choices(n):
    scores = [0.3, -1.0, 2.0, 2.0, 0.1, 5.0]
    choices = [max(chosen) for chosen in itertools.combinations(scores, n)]
    assert expected_best(scores, n) == pytest.approx(sum(choices) / len(choices), abs=1e-12)
    with pytest.raises(HanlinError, match="draw at least 7"):
        expected_best(scores, 7)


def test_of_every_group_the_best_is_kept_and_of_equal_ones_the_first():
    samples = [
        Sample(Prompt((1,), "q", {}, number=group), [place], str(place), [0.0], [True], group=group)
        for place, group in enumerate([0, 0, 0, 1, 1])
    ]
    assert [s.text for s in best_of_n(samples, [1.0, 3.0, 3.0, -2.0, -1.0])] == ["1", "4"]
    with pytest.raises(HanlinError, match="NaN"):
        best_of_n(samples, [1.0, math.nan, 3.0, -2.0, -1.0])
    with pytest.raises(HanlinError, match="5 answers and 2 scores"):
        best_of_n(samples, [1.0, 2.0])
