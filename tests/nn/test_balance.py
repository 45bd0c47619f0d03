"""Losses that balance a router, against transformers and by hand."""

import pytest
import torch
from tests.nn.lifting import lifted
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from hanlin.core.errors import HanlinError
from hanlin.nn.balance import expert_load, load_balance_loss, max_violation, router_z_loss
from hanlin.nn.routing import RouterConfig, Routing, route


def layers(count: int, *, tokens: int = 12, experts: int = 5, k: int = 2) -> tuple[list[torch.Tensor], list[Routing]]:
    torch.manual_seed(0)
    logits = [torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    return logits, [route(z, RouterConfig(k)) for z in logits]


MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_load_balance_equals_that_of_transformers(mask, depth, k):
    logits, notes = layers(depth, k=k)
    ours = load_balance_loss(notes, None if mask is None else mask.bool())
    twins = [z.detach().clone().requires_grad_() for z in logits]
    with lifted():
        expected = load_balancing_loss_func(tuple(twins), 5, k, mask)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    ours.backward()
    expected.backward()
    for a, b in zip(logits, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10)


def test_load_balance_equals_the_sum_over_experts():
    """Switch, eq. 4: E * sum of f_i P_i, one choice a token."""
    _, (note,) = layers(1, k=1)
    f = [(note.experts == e).double().mean() for e in range(5)]
    p = [note.scores[:, e].mean() for e in range(5)]
    expected = 5 * sum(a * b for a, b in zip(f, p, strict=True))
    torch.testing.assert_close(load_balance_loss([note]), expected, rtol=0, atol=1e-12)


def test_an_even_load_costs_k_and_one_expert_for_all_costs_more():
    even = route(torch.eye(4).repeat(3, 1) * 1e-4, RouterConfig(1))
    assert load_balance_loss([even]).item() == pytest.approx(1.0, abs=1e-3)
    alone = route(torch.tensor([[9.0, 0, 0, 0]]).repeat(3, 1), RouterConfig(1))
    assert load_balance_loss([alone]) > 3.9


def test_sigmoid_scores_are_made_probabilities():
    z = torch.randn(9, 6, dtype=torch.float64)
    note = route(z, RouterConfig(2, kind="sigmoid"))
    p = z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)
    f = torch.nn.functional.one_hot(note.experts, 6).sum((0, 1)).double() / 9
    torch.testing.assert_close(load_balance_loss([note]), 6 * (f * p.mean(0)).sum(), rtol=0, atol=1e-12)


def test_z_loss_is_the_sum_that_transformers_divides():
    logits, notes = layers(1)
    expected = router_z_loss_func(logits[0].view(2, 6, 5)) * 12
    torch.testing.assert_close(router_z_loss(notes), expected, rtol=0, atol=1e-10)


def test_z_losses_of_parts_add_up_to_that_of_the_whole():
    _, notes = layers(2)
    keep = MASK.bool()
    whole = router_z_loss(notes)
    torch.testing.assert_close(router_z_loss(notes, keep) + router_z_loss(notes, ~keep), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(router_z_loss([note]) for note in notes), whole, rtol=0, atol=1e-12)


def test_load_counts_choices():
    weights, scores = torch.ones(3, 2), torch.zeros(3, 4)
    kept = torch.tensor([[True, True], [True, False], [True, True]])
    note = Routing(weights, torch.tensor([[0, 1], [0, 1], [0, 3]]), scores, scores, kept)
    assert expert_load(note).tolist() == [3, 2, 0, 1]
    assert expert_load(note, torch.tensor([True, False, True])).tolist() == [2, 1, 0, 1]
    assert expert_load(note, kept_only=True).tolist() == [3, 1, 0, 1]


def test_violation_is_how_far_the_busiest_lies_above_the_mean():
    assert max_violation(torch.tensor([4, 4, 4])).item() == 0
    assert max_violation(torch.tensor([[6, 0, 0], [3, 2, 1]])).tolist() == [2.0, 0.5]


def test_what_does_not_fit_is_refused():
    _, notes = layers(1)
    for loss in (load_balance_loss, router_z_loss):
        with pytest.raises(HanlinError, match="no layer"):
            loss([])
        with pytest.raises(HanlinError, match="does not fit"):
            loss(notes, torch.ones(5))
