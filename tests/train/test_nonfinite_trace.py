"""A planted NaN or infinity is traced to the module that holds it."""

import math

import pytest
import torch
from tests.train.tiny_training import TinySource, tiny_model, train
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.train.nonfinite_trace import GRADIENT, LOSS, OUTPUT, trace_nonfinite
from hanlin.train.objective import CausalLM, step_loss


def loss_of(model):
    batch = TinySource(4).batch(0)
    return step_loss(CausalLM().loss(model, batch)[0], CausalLM().count(batch))


PLANTED = ("layers.1.mlp.down_proj", "layers.0.self_attn.k_proj", "layers.1.mlp.gate_proj", "layers.0.self_attn.o_proj",
           "layers.1.input_layernorm", "embed_tokens", "norm")  # fmt: skip


@pytest.mark.parametrize("place", PLANTED)
def test_a_weight_that_is_not_finite_is_found_in_its_module(place):
    model, where = tiny_model(), f"model.{place}"
    assert trace_nonfinite(model, lambda: loss_of(model)) is None
    model.get_submodule(where).weight.data.view(-1)[::7] = math.nan
    found = trace_nonfinite(model, lambda: loss_of(model))
    assert (found.module, found.what, found.before) == (where, OUTPUT, "")
    assert found.weights == (f"{where}.weight",)
    assert f"first module whose output is not finite: {where} (" in str(found)


def test_what_overflows_between_two_modules_is_blamed_on_the_one_around_them():
    """Gate and up are finite, their product is not."""
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight.data.mul_(1e25)
    found = trace_nonfinite(model, lambda: loss_of(model))
    assert (found.module, found.before, found.weights) == ("model.layers.1.mlp", "down_proj", ())


def test_finite_outputs_with_a_loss_that_is_not():
    model = tiny_model()
    model.lm_head.weight.data[3] = math.inf
    found = trace_nonfinite(model, lambda: loss_of(model))
    assert found.what == LOSS and "output head" in str(found)


class Root(nn.Module):
    """Finite forward, infinite slope at zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x + self.weight.abs().sqrt()


def test_finite_outputs_with_a_gradient_that_is_not():
    model = nn.Sequential(nn.Linear(3, 3), Root(), nn.Linear(3, 3))
    found = trace_nonfinite(model, lambda: model(torch.ones(2, 3)).sum())
    assert (found.module, found.what) == ("1", GRADIENT)
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_as_before():
    model = tiny_model()
    before = {name: tuple(vars(module)) for name, module in model.named_modules()}
    trace_nonfinite(model, lambda: loss_of(model))
    assert before == {name: tuple(vars(module)) for name, module in model.named_modules()}
    assert not any(module._forward_hooks for module in model.modules())


def test_training_says_the_module():
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[2] = math.inf
    with pytest.raises(HanlinError, match=r"Step 1: .* first module .*: model\.layers\.1\.mlp\.down_proj \("):
        train(None, {"steps": 2, "schedule": {"kind": "constant"}}, model=model)
