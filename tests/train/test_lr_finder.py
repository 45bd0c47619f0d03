"""The range test finds the rates at which a loss falls, and says where it fell fastest."""

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from tests.train.tiny_training import TinySource, tiny_model

from hanlin.core.errors import HanlinError
from hanlin.train.lr_finder import draw_range_test, exponential_rates, range_test, smooth
from hanlin.train.objective import CausalLM, step_loss
from hanlin.train.optim import build_optimizer
from hanlin.train.settings import AdamW


def test_rates_grow_by_one_factor():
    rates = exponential_rates(1e-5, 1e-1, 41)
    assert rates[0] == 1e-5 and rates[-1] == pytest.approx(1e-1)
    assert all(b / a == pytest.approx(10**0.1) for a, b in pairwise(rates))


def test_a_constant_is_smoothed_to_itself_and_the_bias_of_the_start_is_gone():
    assert smooth([2.0] * 5, 0.98) == pytest.approx([2.0] * 5)
    assert smooth([1.0, 4.0], 0.5) == pytest.approx([1.0, (0.5 + 4.0) / 1.5])


def quadratic(curvature: float, dimensions: int = 50, noise: float = 0.0):
    """Gradient descent on c/2 ||w||^2, which diverges above a rate of 2/c; noise: of the gradient, in units of c."""
    weights = torch.ones(dimensions, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def step(number: int, rate: float) -> float:
        nonlocal weights
        loss = float(curvature / 2 * weights.square().sum())
        drawn = torch.randn(dimensions, dtype=torch.float64, generator=generator)
        weights = weights - rate * curvature * (weights + noise * drawn)
        return loss

    return step


@pytest.mark.parametrize("curvature", (1.0, 100.0))
def test_the_steepest_fall_is_found_where_the_closed_form_has_it(curvature):
    """The rate grows as e^(k i), so the loss is near e^(-2 c rate / k), steepest over log rate at rate = k / 2c: within
    15 %."""
    steps, low, high = 200, 1e-5 / curvature, 1.0 / curvature
    found = range_test(quadratic(curvature), low=low, high=high, steps=steps, beta=0.0)
    assert not found.diverged and len(found.rates) == steps
    assert found.suggestion == pytest.approx(math.log(high / low) / (steps - 1) / 2 / curvature, rel=0.15)


@pytest.mark.parametrize("curvature", (1.0, 100.0))
def test_the_test_ends_soon_after_divergence(curvature):
    found = range_test(quadratic(curvature, noise=0.3), low=1e-5 / curvature, high=1000 / curvature, steps=200)
    assert found.diverged and 2 < found.rates[-1] * curvature < 10
    assert found.suggestion < found.best < 2 / curvature


def test_a_loss_that_never_falls_is_refused():
    with pytest.raises(HanlinError, match="did not fall at any rate"):
        range_test(lambda number, rate: 1.0 + number)
    with pytest.raises(HanlinError, match=r"did not fall .*0 steps"):
        range_test(lambda number, rate: math.nan)
    with pytest.raises(HanlinError, match="10 steps"):
        range_test(lambda number, rate: 1.0, steps=3)


def test_a_real_model_gets_a_usable_rate_and_a_plot(tmp_path):
    model, source, objective = tiny_model(), TinySource(8), CausalLM()
    optimizer = build_optimizer(model, AdamW(weight_decay=0.0), 1.0)
    before = deepcopy(model.state_dict())

    def step(number: int, rate: float) -> float:
        batch = source.batch(number % 4)
        loss = step_loss(objective.loss(model, batch)[0], objective.count(batch))
        model.zero_grad()
        loss.backward()
        optimizer.step(rate)
        return float(loss.detach())

    found = range_test(step, low=1e-5, high=10.0, steps=80)
    assert 1e-4 < found.suggestion < 1.0 and found.diverged
    losses = {}
    for rate in (found.suggestion / 100, found.suggestion):
        model.load_state_dict(before)
        optimizer.load({})
        losses[rate] = [step(number, rate) for number in range(25)][-1]
    assert losses[found.suggestion] < losses[found.suggestion / 100]
    draw_range_test(found, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
