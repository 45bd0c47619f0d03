"""Every form of the feed-forward against plain autograd over its named projections, in fp64."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from hanlin.core.errors import HanlinError
from hanlin.nn.activations import ACTIVATIONS
from hanlin.nn.feed_forward import FeedForward, SwiGLU, gate_function, swiglu

EXACT = {"rtol": 0, "atol": 1e-10}


def make(*arguments, **settings) -> FeedForward:
    torch.manual_seed(0)
    layer = FeedForward(*arguments, **settings).double()
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.7)
    return layer


def plainly(layer: FeedForward, x: torch.Tensor, function, gated: bool) -> torch.Tensor:
    def product(linear, x):
        out = x @ linear.weight.T
        return out if linear.bias is None else out + linear.bias

    up = product(layer.up_proj, x)
    return product(layer.down_proj, function(product(layer.gate_proj, x)) * up if gated else function(up))


def assert_same(layer, x, expected):
    out = layer(x)
    torch.testing.assert_close(out, expected, **EXACT)
    direction, inputs = torch.randn_like(out), (x, *layer.parameters())
    for a, b in zip(
        torch.autograd.grad(out, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **EXACT)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_each_form_equals_its_formula(name, gated, bias):
    layer = make(5, 7, activation=name, gated=gated, bias=bias)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert_same(layer, x, plainly(layer, x, ACTIVATIONS[name], gated))


def test_the_names_are_the_checkpoints():
    assert {n.split(".")[0] for n, _ in FeedForward(2, 3).named_parameters()} == {"gate_proj", "up_proj", "down_proj"}
    assert {n.split(".")[0] for n, _ in FeedForward(2, 3, gated=False).named_parameters()} == {"up_proj", "down_proj"}


def test_a_limit_is_gpt_oss_gate():
    layer = make(5, 7, bias=True, limit=0.5)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    gate = layer.gate_proj(x).clamp(max=0.5)
    up = layer.up_proj(x).clamp(-0.5, 0.5)
    assert_same(layer, x, layer.down_proj((up + 1) * gate * torch.sigmoid(1.702 * gate)))


@pytest.mark.parametrize("settings", [{"gated": False}, {"activation": "gelu"}])
def test_a_limit_elsewhere_is_refused(settings):
    with pytest.raises(HanlinError, match="limit"):
        FeedForward(4, 4, limit=7.0, **settings)


def test_an_unknown_activation_is_refused():
    with pytest.raises(HanlinError, match="swiish"):
        FeedForward(4, 4, activation="swiish")


def test_silu_keeps_its_own_backward():
    """The gated silu is the function with the hand-written backward, under both names."""
    assert gate_function("silu") is swiglu and gate_function("swish") is swiglu
    assert gate_function("silu", gated=False) is F.silu
    torch.manual_seed(1)
    special = SwiGLU(4, 6, bias=True)
    torch.manual_seed(1)
    general = FeedForward(4, 6, bias=True)
    x = torch.randn(3, 4)
    assert torch.equal(special(x), general(x))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_copies_and_casts_keep_one_buffer(gated):
    layer = make(4, 6, gated=gated, bias=True)
    for other in (deepcopy(layer), deepcopy(layer).float().double()):
        x = torch.randn(3, 4, dtype=torch.float64)
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=1e-6)
        parts = [p.weight for p in other.projections()]
        assert len({p.untyped_storage().data_ptr() for p in parts}) == 1
        assert {p.untyped_storage().nbytes() for p in parts} == {sum(p.numel() for p in parts) * 8}


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_dropout_stands_behind_the_activation_or_behind_the_output(gated):
    """Everything dropped inside leaves the bias of down_proj; everything dropped behind leaves 0."""
    x = torch.randn(3, 4, dtype=torch.float64)
    inside = make(4, 6, gated=gated, bias=True, dropout=1.0)
    torch.testing.assert_close(inside(x), inside.down_proj.bias.expand(3, 4), **EXACT)
    behind = make(4, 6, gated=gated, bias=True, output_dropout=1.0)
    assert torch.equal(behind(x), torch.zeros_like(x))
    bare = make(4, 6, gated=gated, bias=True)
    for layer in (inside.eval(), behind.eval()):
        assert torch.equal(layer(x), bare(x))


def test_dropout_inside_keeps_the_mean_of_the_output():
    layer, x = make(4, 6, bias=True, dropout=0.3), torch.randn(1, 4, dtype=torch.float64)
    torch.manual_seed(2)
    mean = layer(x.expand(40_000, 4)).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x)[0], rtol=0, atol=0.05)
