"""Advantages beside loops written from the papers, their limits, and what must not change them."""

import math

import pytest
import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.rl.advantages import (
    gae,
    group_advantages,
    moments,
    process_advantages,
    reward_to_go,
    terminal_rewards,
    whiten,
)

GAMMA, LAM = 0.9, 0.7


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values (4, 7) and a mask with observations inside and padding on both sides."""
    torch.manual_seed(seed)
    mask = torch.tensor(
        [[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0]]
    ).bool()
    return torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64), mask


def test_group_advantages_equal_the_formula_for_groups_of_any_size_and_order() -> None:
    torch.manual_seed(1)
    rewards, group = torch.randn(9, dtype=torch.float64), torch.tensor([7, -2, 7, 5, 5, 7, -2, 7, 9])
    for baseline, scale in (("mean", "std"), ("mean", "none"), ("leave_one_out", "none"), ("none", "std")):
        found = group_advantages(rewards, group, baseline=baseline, scale=scale, eps=1e-3)
        for n, (reward, g) in enumerate(zip(rewards.tolist(), group.tolist(), strict=True)):
            own = [r for r, other in zip(rewards.tolist(), group.tolist(), strict=True) if other == g]
            if len(own) == 1:
                assert found[n] == 0
                continue
            mean = sum(own) / len(own)
            others = (sum(own) - reward) / (len(own) - 1)
            std = math.sqrt(sum((r - mean) ** 2 for r in own) / (len(own) - 1))
            wanted = reward - {"mean": mean, "leave_one_out": others, "none": 0.0}[baseline]
            assert abs(float(found[n]) - wanted / (std + 1e-3 if scale == "std" else 1.0)) < 1e-12


def test_leaving_one_out_is_the_mean_baseline_scaled() -> None:
    """RLOO: r_i - mean of the others = G / (G - 1) (r_i - mean)."""
    torch.manual_seed(2)
    rewards, group = torch.randn(12, dtype=torch.float64), torch.arange(12) // 4
    one_out = group_advantages(rewards, group, baseline="leave_one_out", scale="none")
    assert (one_out - 4 / 3 * group_advantages(rewards, group, scale="none")).abs().max() < 1e-12


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_equal_rewards_and_groups_of_one_are_exactly_zero(baseline: str, scale: str) -> None:
    rewards = torch.tensor([0.1] * 7 + [0.3, 1e-7, 2e-7])  # 0.1 seven times over is not 0.7 in fp32
    group = torch.tensor([0] * 7 + [1, 2, 2])
    found = group_advantages(rewards, group, baseline=baseline, scale=scale)
    assert not found[:8].any()
    assert found[8] < 0 < found[9]  # as near as these two are, they are not equal


def test_group_advantages_do_not_depend_on_order_or_company() -> None:
    torch.manual_seed(3)
    rewards, group = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
    whole, order = group_advantages(rewards, group), torch.randperm(12)
    assert (group_advantages(rewards[order], group[order]) - whole[order]).abs().max() < 1e-12
    for g in range(3):
        assert (group_advantages(rewards[group == g], group[group == g]) - whole[group == g]).abs().max() < 1e-12


def test_a_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(HanlinError, match=r"rewards\[1\]"):
        group_advantages(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))
    with pytest.raises(HanlinError, match="group numbers"):
        group_advantages(torch.tensor([1.0, 2.0]), torch.tensor([0]))


def test_gae_equals_its_sum_of_temporal_differences() -> None:
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, over the steps of a row alone."""
    rewards, values, mask = rows()
    last = torch.tensor([0.5, 0.0, -1.0, 2.0], dtype=torch.float64)
    advantages, returns = gae(rewards, values, mask, gamma=GAMMA, lam=LAM, last_value=last)
    for row in range(4):
        steps = mask[row].nonzero()[:, 0].tolist()
        v = [float(values[row, t]) for t in steps] + [float(last[row])]
        deltas = [float(rewards[row, t]) + GAMMA * v[n + 1] - v[n] for n, t in enumerate(steps)]
        for n, t in enumerate(steps):
            wanted = sum((GAMMA * LAM) ** (m - n) * deltas[m] for m in range(n, len(steps)))
            assert abs(float(advantages[row, t]) - wanted) < 1e-12
            assert abs(float(returns[row, t]) - wanted - v[n]) < 1e-12
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_has_the_limits_of_monte_carlo_and_of_one_step() -> None:
    rewards, values, mask = rows()
    all_the_way, returns = gae(rewards, values, mask, gamma=GAMMA, lam=1.0)
    to_go = reward_to_go(rewards, mask, gamma=GAMMA)
    assert (all_the_way - (to_go - values) * mask).abs().max() < 1e-12
    assert (returns - to_go).abs().max() < 1e-12
    one_step, _ = gae(rewards, values, torch.ones_like(mask), gamma=GAMMA, lam=0.0)
    after = torch.cat([values[:, 1:], torch.zeros(4, 1, dtype=torch.float64)], 1)
    assert (one_step - (rewards + GAMMA * after - values)).abs().max() < 1e-12


@pytest.mark.parametrize("compute", [
    lambda rewards, values, mask: reward_to_go(rewards, mask, gamma=GAMMA),
    lambda rewards, values, mask: gae(rewards, values, mask, gamma=GAMMA, lam=LAM)[0],
    lambda rewards, values, mask: gae(rewards, values, mask, gamma=GAMMA, lam=LAM)[1],
])  # fmt: skip
def test_masked_tokens_and_padding_are_as_if_they_were_not_there(compute) -> None:
    rewards, values, mask = rows()
    found = compute(rewards, values, mask)
    for row in range(4):
        kept = mask[row]
        dense = compute(rewards[row, kept][None], values[row, kept][None], torch.ones(1, int(kept.sum())).bool())
        assert (found[row, kept] - dense[0]).abs().max() < 1e-12
    garbage = torch.full((4, 3), 1e9, dtype=torch.float64), torch.zeros(4, 3).bool()
    for left in (True, False):
        wider = [torch.cat((pad, x) if left else (x, pad), 1) for x, pad in
                 ((rewards, garbage[0]), (values, garbage[0]), (mask, garbage[1]))]  # fmt: skip
        assert torch.equal(compute(*wider)[:, 3:] if left else compute(*wider)[:, :7], found)


def test_whitening_makes_mean_0_and_variance_1_over_what_counts() -> None:
    x, _, mask = rows()
    even = whiten(x, keep=mask, eps=0.0)
    assert abs(float(even[mask].mean())) < 1e-12 and abs(float(even[mask].var()) - 1) < 1e-12
    assert not even[~mask].any()
    assert abs(float(whiten(x, eps=0.0, biased=True).var(correction=0)) - 1) < 1e-12
    assert (whiten(x, shift=False) - whiten(x) - x.mean()).abs().max() < 1e-12


def test_whitening_over_ranks_needs_only_their_moments() -> None:
    x, _, mask = rows()
    whole = whiten(x, keep=mask)
    added = moments(x[:1], keep=mask[:1]) + moments(x[1:], keep=mask[1:])
    parts = [whiten(x[part], keep=mask[part], moments=added) for part in (slice(1), slice(1, 4))]
    assert (torch.cat(parts) - whole).abs().max() < 1e-12
    assert torch.equal(added, moments(x, keep=mask)) or (added - moments(x, keep=mask)).abs().max() < 1e-12


def test_whitening_what_does_not_vary_is_harmless() -> None:
    assert not whiten(torch.full((5,), 0.1)).any()
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert whiten(torch.tensor([3.0]), shift=False).tolist() == [3.0]
    assert whiten(torch.zeros(0)).shape == (0,)


def test_process_advantages_equal_the_paper_step_by_step() -> None:
    """DeepSeekMath 4.1.3: rewards normalised over all steps of the group; A_t sums those of steps with index >= t."""
    given = [[0.2, 0.9, 0.4], [0.1], [], [1.0, 1.0], [1.0], [0.5, 0.3]]
    ends = [[1, 3, 6], [4], [], [0, 5], [2], [2, 2]]
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    found = process_advantages(given, ends, group, 7, eps=0.0)
    for row, g in enumerate(group.tolist()):
        all_steps = [r for other, rewards in zip(group.tolist(), given, strict=True) if other == g for r in rewards]
        mean = sum(all_steps) / len(all_steps)
        std = math.sqrt(sum((r - mean) ** 2 for r in all_steps) / (len(all_steps) - 1))
        for t in range(7):
            later = [r for r, end in zip(given[row], ends[row], strict=True) if end >= t]
            wanted = sum((r - mean) / std for r in later) if std else 0.0
            assert abs(float(found[row, t]) - wanted) < 1e-6
    assert not found[3:5].any()  # all of that group's steps are equal


def test_one_step_at_the_end_of_an_answer_is_outcome_supervision() -> None:
    scores, group = torch.tensor([0.3, 1.0, -0.5, 2.0]), torch.tensor([0, 0, 1, 1])
    found = process_advantages([[float(s)] for s in scores], [[4], [2], [3], [4]], group, 5)
    outcome = group_advantages(scores, group)[:, None] * (torch.arange(5) <= torch.tensor([4, 2, 3, 4])[:, None])
    assert (found - outcome).abs().max() < 1e-6


def test_steps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(HanlinError, match="Row 1"):
        process_advantages([[1.0], [1.0]], [[2], [7]], torch.tensor([0, 0]), 7)
    with pytest.raises(HanlinError, match="Row 0"):
        process_advantages([[1.0, 2.0]], [[2]], torch.tensor([0]), 7)
    with pytest.raises(HanlinError, match="rows"):
        process_advantages([[1.0]], [[2]], torch.tensor([0, 0]), 7)


def test_the_score_stands_at_the_last_step_and_every_step_pays_for_its_divergence() -> None:
    kl, _, mask = rows()
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    found = terminal_rewards(scores, mask, kl, 0.5)
    for row, last in enumerate([6, 5, 6, 3]):
        for t in range(7):
            wanted = float(scores[row]) * (t == last) - 0.5 * float(kl[row, t]) if mask[row, t] else 0.0
            assert abs(float(found[row, t]) - wanted) < 1e-12
    assert not terminal_rewards(scores[:1], torch.zeros(1, 7).bool()).any()
    assert torch.equal(reward_to_go(terminal_rewards(scores, mask), mask), scores[:, None] * mask)
