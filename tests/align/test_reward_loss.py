"""Reward losses beside loops, and the identities that tie them together."""

import itertools
import math

import pytest
import torch

from hanlin.align.reward_loss import kwise_loss, listwise_loss, pairwise_loss, pointwise_loss, process_loss
from hanlin.core.errors import HanlinError

GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 3])
RANK = torch.tensor([2, 0, 3, 1, 1, 0, 0, 1, 1, 0])  # the last group has a tie, the one before has one answer


def rewards(n: int = 10) -> torch.Tensor:
    torch.manual_seed(8)
    return torch.randn(n, dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_pairwise_equals_its_formula() -> None:
    chosen, rejected = rewards(12).chunk(2)
    margin = torch.rand(6, dtype=torch.float64)
    for given, centre in ((None, 0.0), (margin, 0.0), (margin, 0.1), (0.5, 0.0)):
        m = torch.zeros(6, dtype=torch.float64) if given is None else torch.as_tensor(given).expand(6)
        wanted = sum(
            -log_sigmoid(w - x - lead) + centre * (w + x) ** 2
            for w, x, lead in zip(chosen.tolist(), rejected.tolist(), m.tolist(), strict=True)
        )
        total, metrics = pairwise_loss(chosen, rejected, given, centre)
        assert abs(float(total) - wanted) < 1e-12
        assert metrics["accuracy"] == (float((chosen > rejected).sum()), 6.0)
        assert metrics["margin"] == (pytest.approx(float((chosen - rejected).sum())), 6.0)


def test_centring_is_all_that_notices_a_constant() -> None:
    chosen, rejected = rewards(12).chunk(2)
    assert abs(float(pairwise_loss(chosen + 5, rejected + 5)[0] - pairwise_loss(chosen, rejected)[0])) < 1e-12
    assert pairwise_loss(chosen + 5, rejected + 5, centre=0.01)[0] > pairwise_loss(chosen, rejected, centre=0.01)[0]


def test_kwise_is_the_mean_over_the_pairs_of_each_group() -> None:
    r = rewards().tolist()
    wanted, right, count = 0.0, 0, 0
    for g in range(4):
        leads = [
            r[i] - r[j]
            for i, j in itertools.permutations(range(10), 2)
            if GROUP[i] == g == GROUP[j] and RANK[i] < RANK[j]
        ]
        wanted += sum(-log_sigmoid(lead) for lead in leads) / max(len(leads), 1)
        right, count = right + sum(lead > 0 for lead in leads), count + len(leads)
    total, metrics = kwise_loss(rewards(), RANK, GROUP)
    assert abs(float(total) - wanted) < 1e-12
    assert metrics == {"accuracy": (float(right), float(count))}


def test_listwise_draws_the_best_of_what_is_left() -> None:
    r, wanted = rewards().tolist(), 0.0
    for i in range(10):
        left = [j for j in range(10) if GROUP[j] == GROUP[i] and RANK[j] >= RANK[i]]
        wanted += math.log(sum(math.exp(r[j]) for j in left)) - r[i]
    assert abs(float(listwise_loss(rewards(), RANK, GROUP)[0]) - wanted) < 1e-12


def test_the_orders_of_a_group_have_probabilities_that_sum_to_1() -> None:
    group = torch.zeros(4, dtype=torch.int64)
    each = [
        float((-listwise_loss(rewards(4), torch.tensor(order), group)[0]).exp())
        for order in itertools.permutations(range(4))
    ]
    assert abs(sum(each) - 1) < 1e-12


def test_two_answers_are_a_pair_in_every_form() -> None:
    chosen, rejected = rewards(12).chunk(2)
    both, group = torch.stack([rejected, chosen], 1).flatten(), torch.arange(12) // 2
    rank = torch.tensor([1, 0] * 6)
    wanted = float(pairwise_loss(chosen, rejected)[0])
    for loss in (kwise_loss, listwise_loss):
        total, metrics = loss(both, rank, group)
        assert abs(float(total) - wanted) < 1e-12
        assert metrics["accuracy"] == (float((chosen > rejected).sum()), 6.0)


@pytest.mark.parametrize("loss", [kwise_loss, listwise_loss])
def test_groups_and_orders_do_not_touch_each_other(loss) -> None:
    r = rewards().requires_grad_()
    total, _ = loss(r, RANK, GROUP)
    slope = torch.autograd.grad(total, r)[0]
    assert slope[6] == 0  # an answer alone
    own = [g == GROUP for g in range(4)]
    parts = [loss(r.detach()[at], RANK[at], torch.zeros_like(GROUP[at]))[0] for at in own]
    assert abs(float(sum(parts) - total.detach())) < 1e-12
    order = torch.randperm(10)
    assert abs(float(loss(r.detach()[order], RANK[order], GROUP[order])[0] - total.detach())) < 1e-12
    assert abs(float(loss(r.detach() + 3, RANK, GROUP)[0] - total.detach())) < 1e-12
    none = torch.zeros(0)
    assert float(loss(none, none.long(), none.long())[0]) == 0 and loss(none, none.long(), none.long())[1] == {}
    assert loss(r.detach()[:1], RANK[:1], GROUP[:1])[1] == {}


def test_pointwise_is_a_square_or_a_cross_entropy() -> None:
    r, targets = rewards(5), torch.tensor([1.0, 0.0, 0.3, 1.0, 0.0])
    total, metrics = pointwise_loss(r, targets)
    assert (
        abs(float(total) - sum((a - b) ** 2 for a, b in zip(r.tolist(), targets.double().tolist(), strict=True)))
        < 1e-12
    )
    assert metrics["error"] == (pytest.approx(float((r - targets.double()).abs().sum())), 5.0)
    total, metrics = pointwise_loss(r, targets, kind="logistic")
    wanted = sum(
        -b * log_sigmoid(a) - (1 - b) * log_sigmoid(-a)
        for a, b in zip(r.tolist(), targets.double().tolist(), strict=True)
    )
    assert abs(float(total) - wanted) < 1e-12
    assert metrics["accuracy"] == (float(((r > 0) == (targets > 0.5)).sum()), 5.0)
    with pytest.raises(HanlinError, match="kind"):
        pointwise_loss(r, targets, kind="hinge")  # ty: ignore


def test_a_step_is_judged_by_two_logits_or_by_their_difference() -> None:
    logits, labels = rewards(14).reshape(7, 2), torch.tensor([1, 0, 1, 1, 0, 1, 0])
    total, metrics = process_loss(logits, labels)
    wanted = sum(
        math.log(math.exp(a) + math.exp(b)) - (b if label else a)
        for (a, b), label in zip(logits.tolist(), labels.tolist(), strict=True)
    )
    assert abs(float(total) - wanted) < 1e-12
    one, same = process_loss(logits[:, 1] - logits[:, 0], labels)
    assert abs(float(one) - wanted) < 1e-12 and same == metrics
    assert metrics["accuracy"] == (float((logits.argmax(1) == labels).sum()), 7.0)
