"""The earth-mover loss against transport plans written out, and through the head."""

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.nn.chunked_head import Head
from hanlin.nn.earth_mover import earth_mover, linear_earth_mover
from hanlin.nn.losses import IGNORE


def example():
    torch.manual_seed(0)
    logits = (torch.randn(2, 5, 7, dtype=torch.float64) * 2).requires_grad_()
    embeddings = torch.randn(7, 3, dtype=torch.float64)
    targets = torch.randint(0, 7, (2, 5))
    targets[0, 1], targets[1, 4] = IGNORE, IGNORE
    return logits, targets, embeddings


def by_hand(logits, targets, embeddings):
    """Every token's probability is carried to the target, at the price of that way."""
    total = 0.0
    for row, target in zip(logits.detach().flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target == IGNORE:
            continue
        q = row.exp() / row.exp().sum()
        for token in range(len(q)):
            a, b = embeddings[token], embeddings[target]
            total += float(q[token] * (1 - (a @ b) / (a.norm() * b.norm())))
    return total


def test_it_is_the_price_of_carrying_all_probability_to_the_target():
    logits, targets, embeddings = example()
    assert abs(float(earth_mover(logits.detach(), targets, embeddings)) - by_hand(logits, targets, embeddings)) <= 1e-10
    assert torch.autograd.gradcheck(lambda z: earth_mover(z, targets, embeddings), (logits,))


def test_a_near_miss_costs_less_than_a_blunder():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]])
    sure = 20 * torch.eye(3)
    target = torch.zeros(1, dtype=torch.int64)
    right, near, blunder = (float(earth_mover(sure[i : i + 1], target, embeddings)) for i in range(3))
    assert right <= 1e-6 < near < 0.01 < 1.99 < blunder <= 2.0


def test_through_the_head_it_is_the_same():
    _, targets, embeddings = example()
    hidden = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    head = Head(torch.randn(7, 4, dtype=torch.float64, requires_grad=True), softcap=3.0)
    found = linear_earth_mover(hidden, head, targets, embeddings, chunk=3)
    expected = earth_mover(3 * torch.tanh(hidden @ head.weight.T / 3), targets, embeddings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    inputs = (hidden, head.weight)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_what_does_not_fit_is_refused():
    logits, targets, embeddings = example()
    with pytest.raises(HanlinError, match="one row for each of the 7 tokens"):
        earth_mover(logits, targets, embeddings[:6])
    with pytest.raises(HanlinError, match="Targets"):
        earth_mover(logits, targets[:1], embeddings)
