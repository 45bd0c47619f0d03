"""Dropout keeps the mean, alpha dropout mean and variance; both repeat under a generator, backward too."""

import math

import pytest
import torch
import torch.nn.functional as F

from hanlin.core.errors import HanlinError
from hanlin.nn.dropout import AlphaDropout, Dropout, alpha_dropout, dropout

N = 400_000


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_p_becomes_0_and_the_rest_is_scaled(p):
    x = torch.randn(N, dtype=torch.float64) + 3
    out = dropout(x, p, generator=seeded(0))
    dropped = out == 0
    deviation = math.sqrt(p * (1 - p) / N)
    assert abs(float(dropped.double().mean()) - p) <= 5 * deviation
    torch.testing.assert_close(out[~dropped], x[~dropped] / (1 - p), rtol=1e-14, atol=0)
    assert abs(float(out.mean() - x.mean())) <= 5 * 3.2 * math.sqrt(p / (1 - p) / N)


def test_the_choice_of_one_number_says_nothing_of_the_next():
    kept = (dropout(torch.ones(N), 0.5, generator=seeded(1)) > 0).double() - 0.5
    for lag in (1, 2, 7, 64):
        assert abs(float((kept[lag:] * kept[:-lag]).mean()) * 4) <= 5 / math.sqrt(N)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_alpha_dropout_keeps_mean_0_and_variance_1(p):
    x = torch.randn(N, dtype=torch.float64)
    out = alpha_dropout(x, p, generator=seeded(2))
    assert abs(float(out.mean())) <= 0.01
    assert abs(float(out.var()) - 1) <= 0.015
    assert abs(float(dropout(x, p, generator=seeded(2)).var()) - 1) > 0.04  # what the other one does to it


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_alpha_dropout_has_the_two_levels_of_torchs(p):
    """Of x = 0 only two numbers can come: b, and what a dropped one becomes."""
    torch.manual_seed(0)
    theirs = F.alpha_dropout(torch.zeros(1000, dtype=torch.float64), p, training=True).unique()
    ours = alpha_dropout(torch.zeros(1000, dtype=torch.float64), p, generator=seeded(3)).unique()
    assert len(ours) == 2
    # torch holds its alpha in single precision
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_self_normalising_layers_need_alpha_dropout():
    """After 16 layers of SELU with alpha dropout the numbers still have mean 0 and variance 1."""
    torch.manual_seed(1)
    x, plain = torch.randn(2, 512, 256)
    choice = seeded(4)
    for _ in range(16):
        weight = torch.randn(256, 256) / 16
        x = alpha_dropout(F.selu(x @ weight), 0.1, generator=choice)
        plain = dropout(F.selu(plain @ weight), 0.1, generator=choice)
    assert abs(float(x.mean())) <= 0.1 and abs(float(x.var()) - 1) <= 0.2
    assert abs(float(plain.var()) - 1) > 0.2


@pytest.mark.parametrize("function", [dropout, alpha_dropout])
def test_the_gradient_is_the_slope_of_the_same_choice(function):
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, 0.4, generator=seeded(5)), (x,))
    out = function(x, 0.4, generator=seeded(5))
    (slope,) = torch.autograd.grad(out.sum(), x)
    other = function(x + 1, 0.4, generator=seeded(5))
    torch.testing.assert_close(other - out, slope, rtol=0, atol=1e-10)  # linear in x
    assert (slope == 0).any() and (slope != 0).any()


@pytest.mark.parametrize("layer", [Dropout, AlphaDropout])
def test_a_generator_repeats_and_torchs_own_is_left_alone(layer):
    x = torch.randn(50)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = layer(0.5, generator=seeded(6)), layer(0.5, generator=seeded(6))
    a, b = first(x), first(x)
    assert torch.equal(a, second(x)) and torch.equal(b, second(x))
    assert not torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(layer(0.5)(x), layer(0.5)(x))


@pytest.mark.parametrize("layer", [Dropout, AlphaDropout])
def test_evaluation_and_p_0_change_nothing(layer):
    x = torch.randn(9)
    assert layer(0.5).eval()(x) is x
    assert layer(0.0)(x) is x


def test_everything_can_be_dropped():
    x = torch.randn(9, requires_grad=True)
    out = dropout(x, 1.0)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(9)) and torch.equal(x.grad, torch.zeros(9))
    assert torch.equal(F.dropout(x, 1.0), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", [dropout, alpha_dropout])
def test_the_dtype_stays(function, dtype):
    assert function(torch.randn(9).to(dtype), 0.5).dtype == dtype


def test_no_probability_is_refused():
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(HanlinError, match="between 0 and 1"):
            Dropout(bad)
    with pytest.raises(HanlinError, match="below 1"):
        alpha_dropout(torch.ones(2), 1.0)
