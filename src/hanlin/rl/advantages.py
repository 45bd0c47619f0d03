"""Advantages: how much better something was than expected, from rewards.

    group          A_i = (r_i - mean of its group) / std of its group           GRPO, arXiv:2402.03300 (4.1.2)
    leave one out  A_i = r_i - mean of the others                               RLOO, arXiv:2402.14740
    process        A_t = sum of the normalised rewards of steps that end at or after t      arXiv:2402.03300 (4.1.3)
    to go          G_t = r_t + gamma G_{t+1}                                    REINFORCE
    GAE            A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t      arXiv:1506.02438

Rows (rows, T) are trajectories with a bool mask of the tokens that the policy chose. The others (tool output, padding
on either side) are no steps: values, returns and advantages pass over them as if they were not there.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    baseline: Literal["mean", "leave_one_out", "none"] = "mean",
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each completion over the others that answered the same prompt.

    rewards (n,) float, group (n,) int64 ids of any order -> (n,). scale "std": divided by the group's standard
    deviation (unbiased) + eps; "none": Dr. GRPO (arXiv:2503.20783). A group whose rewards are all equal, and so a group
    of one, has nothing to compare: exact zeros (but for baseline "none" with scale "none", which is the rewards). The
    field's eps differ: 1e-6 in verl, 1e-4 in TRL, 1e-9 in OpenRLHF.
    """
    if rewards.shape != group.shape:
        raise HanlinError(f"There are {list(rewards.shape)} rewards and {list(group.shape)} group numbers.")
    if not bool(rewards.isfinite().all()):
        raise HanlinError(f"rewards[{int((~rewards.isfinite()).nonzero()[0])}] is not finite; advantages need numbers.")
    if baseline not in ("mean", "leave_one_out", "none") or scale not in ("std", "none"):
        raise HanlinError(f"baseline {baseline!r} must be mean, leave_one_out or none, scale {scale!r} std or none.")
    if baseline == "none" and scale == "none":
        return rewards.clone()
    ids, place = group.unique(return_inverse=True)
    sizes = torch.bincount(place, minlength=len(ids)).to(rewards.dtype)
    mean = _sum_by(rewards, place, len(ids)) / sizes
    from_mean = rewards - mean[place]
    advantages = rewards if baseline == "none" else from_mean
    if baseline == "leave_one_out":
        advantages = advantages * (sizes / (sizes - 1).clamp_min(1))[place]  # r_i - mean_{j != i} r_j
    if scale == "std":
        variance = _sum_by(from_mean.square(), place, len(ids)) / (sizes - 1).clamp_min(1)
        advantages = advantages / (variance.sqrt() + eps)[place]
    return advantages.masked_fill(~varies(rewards, place)[place], 0.0)


def varies(rewards: Tensor, group: Tensor) -> Tensor:
    """Whether the rewards of each group are not all equal (exactly): (n,), (n,) int64 in 0 ... k - 1 -> (k,) bool."""
    count = int(group.max()) + 1 if len(group) else 0
    lowest = rewards.new_zeros(count).scatter_reduce(0, group, rewards, "amin", include_self=False)
    highest = rewards.new_zeros(count).scatter_reduce(0, group, rewards, "amax", include_self=False)
    return lowest != highest


def _sum_by(x: Tensor, place: Tensor, count: int) -> Tensor:
    return x.new_zeros(count).index_add(0, place, x)


def moments(x: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """Count, sum and sum of squares of x (of those in `keep`): (3,) fp64, so that ranks can add theirs up."""
    return _moments(x, keep)


def _moments(x: Tensor, keep: Tensor | None) -> Tensor:
    x = (x if keep is None else x[keep]).double()
    return torch.stack([x.new_tensor(float(x.numel())), x.sum(), x.square().sum()])


def whiten(
    x: Tensor,
    *,
    shift: bool = True,
    eps: float = 1e-8,
    biased: bool = False,
    keep: Tensor | None = None,
    moments: Iterable[Tensor] | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps), any shape; entries outside `keep` (bool, x's shape) do not count and become 0.

    shift False: the mean is added back. biased: divide by the count, as OpenRLHF does; verl and TRL divide by the count
    less one. moments: those of all ranks, as `moments` gives them, in place of x's own. Fewer than two numbers, or
    equal ones, have no spread: they come back as 0 (shift) or as they were.
    """
    count, total, squares = _moments(x, keep) if moments is None else (m.double() for m in moments)
    mean = total / count.clamp_min(1)
    freedom = (count if biased else count - 1).clamp_min(1)
    variance = (squares - total * mean).clamp_min(0) / freedom
    away = x.double() - mean
    even = away * torch.rsqrt(variance + eps)
    if not shift:
        even = even + mean
    out = even.to(x.dtype)
    return out if keep is None else out.masked_fill(~keep, 0.0)


def reward_to_go(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma G of the next step: (rows, T), bool (rows, T) -> (rows, T), 0 outside the mask."""
    returns = torch.zeros_like(rewards)
    after = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        after = torch.where(mask[:, t], rewards[:, t] + gamma * after, after)
        returns[:, t] = after
    return returns.masked_fill(~mask, 0.0)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_value: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """Generalised advantages, and returns (advantage + value) for a critic to learn; (rows, T), 0 outside the mask.

    rewards, values (rows, T), mask bool (rows, T). last_value: V after the last step, a number or (rows,): 0 where the
    episode ended, the critic's estimate where it was only cut off. No gradient.
    """
    rewards, values = rewards.detach(), values.detach()
    advantages = torch.zeros_like(values)
    after = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(values[:, 0]) + last_value
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        after = torch.where(here, delta + gamma * lam * after, after)
        following = torch.where(here, values[:, t], following)
        advantages[:, t] = after
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values.masked_fill(~mask, 0.0)


def process_advantages(
    step_rewards: Sequence[Sequence[float]],
    step_ends: Sequence[Sequence[int]],
    group: Tensor,
    length: int,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Advantages of process rewards: each token gets the normalised rewards of the steps it is part of or leads to.

    step_rewards, step_ends: of each row its steps' rewards and the places of their last tokens in 0 ... length - 1;
    group (rows,) int64 -> (rows, length) fp32. All step rewards of a group, whatever row and however many, are
    normalised together: (r - mean) / (std + eps), std unbiased; equal ones, and so a single one, give zeros.
    """
    if not len(step_rewards) == len(step_ends) == len(group):
        raise HanlinError(
            f"Step rewards for {len(step_rewards)} rows, ends for {len(step_ends)}, {len(group)} group numbers."
        )
    for row, (given, ends) in enumerate(zip(step_rewards, step_ends, strict=True)):
        if len(given) != len(ends) or any(not 0 <= end < length for end in ends):
            raise HanlinError(
                f"Row {row} has {len(given)} step rewards and ends {list(ends)}; it needs one end a reward, each "
                f"within 0 ... {length - 1}."
            )
    row = torch.tensor([n for n, given in enumerate(step_rewards) for _ in given], dtype=torch.int64)
    rewards = torch.tensor([float(r) for given in step_rewards for r in given], dtype=torch.float64)
    ends = torch.tensor([end for ends in step_ends for end in ends], dtype=torch.int64)
    normalised = group_advantages(rewards, group.cpu()[row], eps=eps)
    at_ends = torch.zeros(len(group), length, dtype=torch.float64).index_put((row, ends), normalised, accumulate=True)
    return at_ends.flip(1).cumsum(1).flip(1).float().to(group.device)


def terminal_rewards(scores: Tensor, mask: Tensor, kl: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """A reward a token: the score at the last step of a row, less beta kl at each (PPO, REINFORCE++).

    scores (rows,), mask bool (rows, T), kl (rows, T) -> (rows, T), 0 outside the mask. The score of a row without a
    step is lost.
    """
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = places.masked_fill(~mask, -1).amax(1, keepdim=True)
    rewards = torch.where((places == last) & mask, scores[:, None], torch.zeros_like(scores)[:, None])
    return rewards if kl is None else rewards - beta * kl.masked_fill(~mask, 0.0)
