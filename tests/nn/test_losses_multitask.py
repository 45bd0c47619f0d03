"""Weights of several tasks: fixed ones, and the uncertainty weights against the paper's formula."""

import pytest
import torch
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.nn.multitask import UncertaintyWeights, fixed_weights

KINDS = {"depth": "regression", "tokens": "classification", "next sentence": "classification"}


def test_fixed_weights_multiply():
    sums = {"mlm": torch.tensor(6.0), "nsp": torch.tensor(0.5)}
    assert fixed_weights(sums, {"nsp": 4.0, "mlm": 0.5}) == {"mlm": 3.0, "nsp": 2.0}


def test_uncertainty_is_the_formula_of_the_paper():
    """L / (2 sigma^2) + log sigma for a regression, L / sigma^2 + log sigma for a classification; L are means."""
    weights = UncertaintyWeights(KINDS).double()
    sigmas = torch.tensor([0.4, 1.3, 2.0], dtype=torch.float64)
    with torch.no_grad():
        weights.log_variance.copy_(2 * sigmas.log())
    means, counts = [3.0, 0.7, 1.9], [10.0, 7.0, 2.0]
    sums = {task: torch.tensor(m * n, dtype=torch.float64) for task, m, n in zip(KINDS, means, counts, strict=True)}
    out = weights(sums, dict(zip(KINDS, counts, strict=True)))
    total = sum(out[task] / n for task, n in zip(KINDS, counts, strict=True))
    d, t, s = sigmas.tolist()
    expected = 3.0 / (2 * d**2) + 0.7 / t**2 + 1.9 / s**2 + sigmas.log().sum()
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-10)


def test_micro_batches_add_up_to_the_whole_batch():
    weights = UncertaintyWeights(KINDS)
    nn.init.normal_(weights.log_variance)
    parts = [({t: torch.rand(()) * 9 for t in KINDS}, {t: float(i + j) for j, t in enumerate(KINDS)}) for i in (0, 3)]
    whole = weights(
        {t: parts[0][0][t] + parts[1][0][t] for t in KINDS}, {t: parts[0][1][t] + parts[1][1][t] for t in KINDS}
    )
    pieces = [weights(*part) for part in parts]
    for task in KINDS:
        torch.testing.assert_close(pieces[0][task] + pieces[1][task], whole[task], rtol=0, atol=1e-5)


def test_at_rest_every_task_weighs_the_same():
    weights = UncertaintyWeights({"hard": "classification", "easy": "regression"}).double()
    means = {"hard": torch.tensor(5.0).double(), "easy": torch.tensor(0.01).double()}
    optimizer = torch.optim.LBFGS(weights.parameters(), lr=0.5, max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = sum(weights(means, {"hard": 1, "easy": 1}).values())
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.tensor([2 * 5.0, 2 * 0.5 * 0.01], dtype=torch.float64)
    torch.testing.assert_close(weights.log_variance.detach().exp(), expected, rtol=1e-4, atol=0)


def test_gradients_reach_the_losses_and_the_variances():
    weights = UncertaintyWeights({"a": "classification", "b": "regression"}).double()

    def loss(a, b, s):
        out = torch.func.functional_call(weights, {"log_variance": s}, ({"a": a, "b": b}, {"a": 3, "b": 5}))
        return out["a"] / 3 + out["b"] / 5

    values = torch.rand(4, dtype=torch.float64)
    inputs = (values[0].clone(), values[1].clone(), values[2:].clone())
    assert torch.autograd.gradcheck(loss, tuple(x.requires_grad_() for x in inputs))


def test_wrong_names_and_kinds_are_refused():
    with pytest.raises(HanlinError, match=r'no task "toknes".*Did you mean "tokens"'):
        fixed_weights({"toknes": torch.zeros(())}, {"tokens": 1.0})
    with pytest.raises(HanlinError, match='"b" is missing'):
        fixed_weights({"a": torch.zeros(())}, {"a": 1.0, "b": 1.0})
    with pytest.raises(HanlinError, match="'ranking'"):
        UncertaintyWeights({"a": "ranking"})
    with pytest.raises(HanlinError, match="at least one task"):
        UncertaintyWeights({})
    with pytest.raises(HanlinError, match='"a" is missing'):
        UncertaintyWeights({"a": "regression"})({"a": torch.zeros(())}, {})
