"""Adafactor against torch's where both follow the paper, and by its formulas where they part."""

import pytest
import torch

from hanlin.train.adafactor import Adafactor


def run(make, start, gradients):
    weight = torch.nn.Parameter(start.clone())
    optimizer = make([weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (17,)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_torchs(shape, decay):
    """fp64, 30 steps, at a rate below torch's own 1 / sqrt(t): 1e-12."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape).double(), torch.randn(30, *shape).double()
    ours, state = run(lambda p: Adafactor(p, lr=0.01, weight_decay=decay, factored=len(shape) > 1), start, gradients)
    theirs, _ = run(
        lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=decay, eps=(1e-30, 1e-3)), start, gradients
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert sum(t.numel() for name, t in state.items() if name != "step") == (sum(shape) if len(shape) > 1 else 17)


def test_a_stack_is_treated_matrix_by_matrix():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 8, 12).double(), torch.randn(10, 3, 8, 12).double()
    start[1] *= 100
    whole, _ = run(Adafactor, start, gradients)
    for e in range(3):
        one, _ = run(Adafactor, start[e], gradients[:, e])
        torch.testing.assert_close(whole[e], one, rtol=0, atol=1e-12)


def test_without_scale_the_rate_is_absolute_and_momentum_averages_updates():
    """By hand, fp64: one vector, three steps."""
    torch.manual_seed(0)
    start, gradients = torch.randn(6).double(), torch.randn(3, 6).double()
    found, _ = run(
        lambda p: Adafactor(p, lr=0.1, scale_by_weights=False, momentum=0.6, clip=0.5, factored=False), start, gradients
    )
    weight, variance, average = start.clone(), torch.zeros(6).double(), torch.zeros(6).double()
    for t, g in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        variance = beta * variance + (1 - beta) * (g * g + 1e-30)
        update = g / variance.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()) / 0.5)
        average = 0.6 * average + 0.4 * update
        weight = weight - 0.1 * average
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-12)


def test_rows_and_columns_are_all_that_is_kept_of_a_rank_one_square():
    """Where g^2 is an outer product, the estimate is exact and every update is +-1 before the clip."""
    u, v = torch.rand(5).double() + 0.1, torch.rand(7).double() + 0.1
    gradient = torch.outer(u, v)
    weight, _ = run(
        lambda p: Adafactor(p, lr=1.0, scale_by_weights=False, clip=1e9), torch.zeros(5, 7).double(), [gradient]
    )
    torch.testing.assert_close(weight, -torch.ones(5, 7).double(), rtol=0, atol=1e-9)
