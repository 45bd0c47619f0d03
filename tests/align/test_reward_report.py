"""The numbers of a reward model's report, against their definitions and data whose truth is known."""

import math
from itertools import pairwise

import pytest
import torch

from hanlin.align.reward_report import (
    Judged,
    accuracy,
    accuracy_by_length,
    calibration_error,
    correlation,
    figures,
    reliability,
    write_reward_report,
)


def pairs(count: int, *, true: float = 1.0, seed: int = 0, per_token: float = 0.0) -> Judged:
    """Pairs drawn by Bradley and Terry from margins `true` times those that the model says; longer answers get
    `per_token` more reward than they deserve."""
    chance = torch.Generator().manual_seed(seed)
    worth = 1.5 * torch.randn(2 * count, generator=chance, dtype=torch.float64)
    lengths = torch.randint(1, 40, (2 * count,), generator=chance).double()
    first = torch.arange(0, 2 * count, 2)
    better = torch.rand(count, generator=chance, dtype=torch.float64) < torch.sigmoid(
        true * (worth[first] - worth[first + 1])
    )
    high, low = torch.where(better, first, first + 1), torch.where(better, first + 1, first)
    return Judged(worth + per_token * lengths, lengths, high, low, None, False, 0.5)


def brute_force_ece(margins: list[float], bins: int = 10) -> float:
    total = 0.0
    for number in range(bins):
        low, high = 0.5 + number / 20, 0.5 + (number + 1) / 20
        here = [m for m in margins if low <= 1 / (1 + math.exp(-abs(m))) < high + (number == bins - 1)]
        if here:
            sure = sum(1 / (1 + math.exp(-abs(m))) for m in here) / len(here)
            right = sum(m > 0 for m in here) / len(here)
            total += len(here) * abs(sure - right)
    return total / len(margins)


def test_the_calibration_error_is_that_of_its_definition_and_small_where_the_chances_are_true():
    judged = pairs(4000)
    margins = judged.margins
    found = calibration_error(reliability(margins))
    assert found == pytest.approx(brute_force_ece(margins.tolist()), abs=1e-12)
    assert found < 0.02
    sure = pairs(4000, true=0.3)  # says 3 times what is true
    assert calibration_error(reliability(sure.margins)) > 0.1
    assert sum(row.count for row in reliability(margins)) == 4000
    assert all(0.5 <= row.low <= row.confidence <= row.high <= 1.0 for row in reliability(margins))
    assert calibration_error([]) == 0


def test_ties_count_half():
    assert accuracy(torch.tensor([1.0, 0.0, -1.0, 2.0])) == 0.625
    assert accuracy(torch.zeros(3)) == 0.5


def test_a_model_that_counts_words_is_found_out():
    fair, biased = figures(pairs(4000)), figures(pairs(4000, per_token=0.2))
    assert abs(fair["length_correlation"]) < 0.05 < 0.5 < biased["length_correlation"]
    gap = "accuracy_better_longer", "accuracy_better_shorter"
    assert abs(fair[gap[0]] - fair[gap[1]]) < 0.05
    assert biased[gap[0]] - biased[gap[1]] > 0.3
    table = accuracy_by_length(pairs(4000, per_token=0.2))
    assert [row[2] for row in table] == [800] * 5
    assert [row[3] for row in table] == sorted(row[3] for row in table)
    assert all(one[1] <= two[0] for one, two in pairwise(table))


def test_correlations_are_those_of_torch_and_of_ranks():
    torch.manual_seed(0)
    a = torch.randn(50, dtype=torch.float64)
    b = a + torch.randn(50, dtype=torch.float64)
    assert correlation(a, b) == pytest.approx(float(torch.corrcoef(torch.stack([a, b]))[0, 1]), abs=1e-12)
    assert correlation(a, torch.ones(50)) == 0
    none = torch.zeros(0, dtype=torch.long)
    scored = Judged(a.exp(), torch.ones(50), none, none, a, False, 0.1)  # another scale, the same order
    found = figures(scored)
    assert found["rank_correlation"] == pytest.approx(1.0) and found["correlation"] < 0.99
    assert found["squared_error"] == pytest.approx(float((a.exp() - a).square().mean()))
    tied = Judged(
        torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.zeros(4), none, none, torch.tensor([0.0, 0.0, 1.0, 2.0]), False, 0
    )
    assert figures(tied)["rank_correlation"] == pytest.approx(_spearman([1.5, 1.5, 3.5, 3.5], [1.5, 1.5, 3.0, 4.0]))


def _spearman(a: list[float], b: list[float]) -> float:
    return float(torch.corrcoef(torch.tensor([a, b]))[0, 1])


def test_labels_are_judged_by_the_sign_of_the_reward(tmp_path):
    none = torch.zeros(0, dtype=torch.long)
    rewards = torch.tensor([2.0, -1.0, 0.5, -3.0], dtype=torch.float64)
    judged = Judged(rewards, torch.zeros(4), none, none, torch.tensor([1.0, 0.0, 0.0, 1.0]), True, 0.2)
    assert judged.margins.tolist() == [2.0, 1.0, -0.5, -3.0]
    assert figures(judged)["accuracy"] == 0.5
    write_reward_report(tmp_path, judged, ["Form process."])
    text = (tmp_path / "report.md").read_text()
    assert "4 rewards, 4 judgements" in text and "## Calibration" in text and "## Length" not in text
    assert (tmp_path / "reward.png").stat().st_size > 5_000
