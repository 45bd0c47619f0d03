"""Activations against transformers' functions of the same name, and the clamped gate against a loop over numbers."""

import math

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.nn.activations import ACTIVATIONS, activation, clamped_swiglu

X = torch.linspace(-9, 9, 721, dtype=torch.float64)

FORMULAS = {
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_bloom": lambda x: 0.5 * x * (1 + math.tanh(0.79788456 * (x + 0.044715 * x**3))),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "identity": lambda x: x,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}
ALIASES = {"gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "linear": "identity", "swish": "silu"}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_each_name_is_its_formula(name):
    formula = FORMULAS[ALIASES.get(name, name)]
    expected = torch.tensor([formula(float(x)) for x in X], dtype=torch.float64)
    torch.testing.assert_close(activation(name)(X), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() - {"elu", "identity", "selu", "gelu_bloom"}))
def test_transformers_means_the_same_by_the_name(name):
    from transformers.activations import ACT2FN

    torch.testing.assert_close(activation(name)(X), ACT2FN[name](X), rtol=0, atol=1e-10)


def test_bloom_has_its_own_gelu():
    from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

    torch.testing.assert_close(activation("gelu_bloom")(X), bloom_gelu_forward(X), rtol=0, atol=1e-13)
    assert (activation("gelu_new")(X) - bloom_gelu_forward(X)).abs().max() > 1e-11


def test_an_unknown_name_is_told_its_neighbour():
    with pytest.raises(HanlinError, match=r"Did you mean 'gelu'.*silu"):
        activation("geluu")


@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (1.0, 2.0)])
def test_the_clamped_gate_equals_a_loop(alpha, limit):
    torch.manual_seed(0)
    gate, up = (torch.randn(300, dtype=torch.float64) * 6 for _ in range(2))
    expected = []
    for g, u in zip(gate.tolist(), up.tolist(), strict=True):
        g, u = min(g, limit), max(-limit, min(u, limit))
        expected.append((u + 1) * g / (1 + math.exp(-alpha * g)))
    out = clamped_swiglu(gate, up, alpha=alpha, limit=limit)
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_clamped_number_passes_no_gradient():
    gate = torch.tensor([9.0, 3.0, -9.0], requires_grad=True)
    up = torch.tensor([-8.0, 8.0, 1.0], requires_grad=True)
    clamped_swiglu(gate, up).sum().backward()
    assert gate.grad[0] == 0 and gate.grad[1] != 0 and gate.grad[2] != 0  # the gate has no floor
    assert up.grad[0] == 0 and up.grad[1] == 0 and up.grad[2] != 0


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, math.nan])
def test_a_limit_that_limits_nothing_is_refused(limit):
    with pytest.raises(HanlinError, match="positive"):
        clamped_swiglu(torch.ones(1), torch.ones(1), limit=limit)
