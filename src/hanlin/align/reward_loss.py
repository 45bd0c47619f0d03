"""Losses of reward models: from rewards (one a sequence, or logits a step) and judgements to a sum and metrics.

pointwise   (r - s)^2, or cross-entropy with a label
pairwise    -log sigmoid(r_w - r_l - margin) + centre (r_w + r_l)^2       arXiv:2203.02155, 2307.09288
K-wise      the mean over the pairs of a group of K answers               arXiv:2203.02155 (3.5)
listwise    -sum_k log( exp r_k / sum_{j >= k} exp r_j ), best first      Plackett-Luce, ListMLE (Xia et al. 2008)
process     cross-entropy of right or wrong at the end of each step       arXiv:2305.20050
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.wide import wide

Metrics = dict[str, tuple[float, float]]


def pointwise_loss(
    rewards: Tensor, targets: Tensor, *, kind: Literal["squared", "logistic"] = "squared"
) -> tuple[Tensor, Metrics]:
    """Sum over answers: (r - s)^2, or with "logistic" the cross-entropy of sigmoid(r) with a label in [0, 1].

    rewards, targets (n,). Metrics: error (mean |r - s|), or accuracy (the reward's sign says the label).
    """
    rewards = wide(rewards)
    targets = targets.to(rewards.dtype)
    n = float(len(rewards))
    if kind == "squared":
        error = rewards.detach() - targets
        return (rewards - targets).square().sum(), {"error": (float(error.abs().sum()), n)} if n else {}
    if kind != "logistic":
        raise HanlinError(f"kind is {kind!r}; it must be squared or logistic.")
    right = (rewards.detach() > 0) == (targets > 0.5)
    total = F.binary_cross_entropy_with_logits(rewards, targets, reduction="sum")
    return total, {"accuracy": (float(right.sum()), n)} if n else {}


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, centre: float = 0.0
) -> tuple[Tensor, Metrics]:
    """Sum over pairs of -log sigmoid(r_w - r_l - margin) + centre (r_w + r_l)^2.

    chosen, rejected (pairs,); margin: by how much a pair was judged apart (Llama 2), a number or (pairs,); centre keeps
    rewards around 0, where nothing else would (arXiv:2312.09244; 0.01 is usual). Metrics over pairs: accuracy, margin
    (the lead), reward_chosen, reward_rejected.
    """
    chosen, rejected = wide(chosen), wide(rejected)
    lead = chosen - rejected
    cost = -F.logsigmoid(lead if margin is None else lead - margin)
    if centre:
        cost = cost + centre * (chosen + rejected).square()
    n = float(len(lead))
    with torch.no_grad():
        found = {
            "accuracy": (lead > 0).to(lead.dtype), "margin": lead, "reward_chosen": chosen, "reward_rejected": rejected,
        }  # fmt: skip
        sums = torch.stack(list(found.values())).sum(1).tolist()
    return cost.sum(), {name: (value, n) for name, value in zip(found, sums, strict=True)} if n else {}


def kwise_loss(rewards: Tensor, rank: Tensor, group: Tensor) -> tuple[Tensor, Metrics]:
    """Sum over groups of the mean over a group's pairs of -log sigmoid(r_better - r_worse).

    rewards (n,), rank (n,): the lower, the better, equal ranks are not compared; group (n,) int64 in 0 ... k - 1. The
    mean, as a long group's many pairs share its answers (InstructGPT). A group without a pair adds 0. Metrics: accuracy
    over pairs.
    """
    rewards = wide(rewards)
    better, worse = ((group[:, None] == group) & (rank[:, None] < rank)).nonzero(as_tuple=True)
    lead = rewards[better] - rewards[worse]
    pairs = torch.bincount(group[better], minlength=1)[group[better]]
    n = float(len(lead))
    return (-F.logsigmoid(lead) / pairs).sum(), {"accuracy": (float((lead > 0).sum()), n)} if n else {}


def listwise_loss(rewards: Tensor, rank: Tensor, group: Tensor) -> tuple[Tensor, Metrics]:
    """Sum over groups of the negative log-likelihood of their order under Plackett-Luce.

    rewards (n,), rank (n,): the lower, the better; group (n,) int64. Each answer is drawn by softmax from those of its
    group that are not ranked before it; answers of equal rank are each drawn from all of them (Breslow's treatment of
    ties). Two answers: `pairwise_loss`. Metrics: accuracy, the share of answers with a higher reward than any that is
    ranked after them, of those that have such.
    """
    rewards = wide(rewards)
    left = (group[:, None] == group) & (rank[:, None] <= rank)  # (drawn, of which)
    others = left & (rank[:, None] < rank)
    choice = others.any(1)
    table = rewards.expand(len(rewards), -1)
    cost = table.masked_fill(~left, -torch.inf).logsumexp(1) - rewards
    with torch.no_grad():
        first = rewards > table.masked_fill(~others, -torch.inf).amax(1) if len(rewards) else choice
        metrics = {"accuracy": (float((first & choice).sum()), float(choice.sum()))} if bool(choice.any()) else {}
    return cost.sum(), metrics


def process_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
    """Sum over steps of the cross-entropy of what is said at a step's last token.

    logits (n, 2), of wrong and of right, with labels (n,) int64 or bool; or (n,), the log-odds of right, with labels in
    [0, 1] (shares of rollouts that reach the answer, arXiv:2312.08935). Metrics: accuracy over steps.
    """
    if logits.dim() == 1:
        return pointwise_loss(logits, labels, kind="logistic")
    logits, labels = wide(logits), labels.long()
    right = logits.detach().argmax(1) == labels
    total = F.cross_entropy(logits, labels, reduction="sum")
    return total, {"accuracy": (float(right.sum()), float(len(labels)))} if len(labels) else {}
