"""Norms over the width against torch.nn's modules and plain autograd in fp64: values, gradients, redrawn weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.nn.batch_norms import BatchNorm, GroupNorm, InstanceNorm
from hanlin.nn.norms import LayerNorm, RMSNorm, build_norm, deepnorm_constants, rms_norm

EXACT = {"rtol": 0, "atol": 1e-10}


def redraw(module: nn.Module) -> nn.Module:
    """Every parameter at random, so that a forgotten one shows."""
    module = module.double()
    for parameter in module.parameters():
        parameter.data.normal_(0.3, 1.0)
    return module


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * 2 + 1).requires_grad_()


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, **EXACT)
    direction = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 5, 7)])
def test_layer_norm_equals_torch(shape, bias):
    torch.manual_seed(0)
    ours = redraw(LayerNorm(7, 1e-3, bias=bias))
    theirs = nn.LayerNorm(7, 1e-3, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())  # the names are the same too
    x = random(*shape)
    out = ours(x)
    by_hand = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt() * ours.weight
    assert_same(out, by_hand + ours.bias if bias else by_hand, (x, *ours.parameters()))
    torch.testing.assert_close(out, theirs(x), **EXACT)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_layer_norm_keeps_fp32_statistics_in_bf16(weights):
    torch.manual_seed(0)
    layer = LayerNorm(4096)
    for parameter in layer.parameters():
        parameter.data.normal_(1.0, 0.1)
    layer = layer.to(weights)
    x = (torch.randn(2, 4096) * 10 + 1000).bfloat16()
    out = layer(x)
    expected = F.layer_norm(x.double(), (4096,), layer.weight.double(), layer.bias.double(), 1e-5)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() <= 2**-8 * expected.abs().max()  # one rounding to bf16


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16, torch.float64])
def test_layer_norm_has_right_gradients_in_mixed_precision(x_type, weights):
    torch.manual_seed(5)
    layer = LayerNorm(64).to(weights)
    for parameter in layer.parameters():
        parameter.data.normal_(1.0, 0.3)
    x, direction = torch.randn(50, 64).to(x_type).requires_grad_(), torch.randn(50, 64).to(x_type)
    high = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    found = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), direction)
    expected = torch.autograd.grad(F.layer_norm(high[0], (64,), *high[1:]), high, direction.double())
    for a, b in zip(found, expected, strict=True):
        low = torch.bfloat16 in (x_type, weights)
        assert (a - b).abs().max() <= (0.02 if low else 1e-5) * b.abs().max()


@pytest.mark.parametrize("gradients", [True, False], ids=["training", "no grad"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("x_type", [torch.bfloat16, torch.float32, torch.float64])
def test_unit_offset_multiplies_by_one_more_than_the_weight_in_fp32(x_type, weights, gradients):
    torch.manual_seed(1)
    layer = RMSNorm(64, 1e-5, unit_offset=True)
    assert torch.equal(layer.weight, torch.zeros(64))  # the product starts at 1
    layer.weight.data.normal_(0, 0.1)
    layer = layer.to(weights)
    x = torch.randn(3, 64).to(x_type)
    with torch.set_grad_enabled(gradients):
        out = layer(x)
    high = x.double()
    expected = high / (high.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + layer.weight.double())
    assert out.dtype == x_type
    # bf16: 1 + w is not rounded to bf16 before the product, which would double the error
    tolerance = {torch.bfloat16: 2**-8 * 1.001, torch.float32: 1e-6, torch.float64: 1e-13}
    relative = tolerance[x_type] if weights != torch.float32 or x_type != torch.float64 else 1e-6
    assert ((out - expected) / expected).abs().max() <= relative


def test_unit_offset_has_the_gradients_of_the_formula():
    torch.manual_seed(2)
    layer, x = redraw(RMSNorm(6, 1e-3, unit_offset=True)), random(2, 3, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + layer.weight)
    assert_same(layer(x), expected, (x, layer.weight))


def test_gemma_norm_of_transformers_is_the_same():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    torch.manual_seed(3)
    theirs = GemmaRMSNorm(32, eps=1e-5)
    theirs.weight.data.normal_(0, 0.3)
    ours = RMSNorm(32, 1e-5, unit_offset=True)
    ours.load_state_dict(theirs.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 32).to(dtype)
        torch.testing.assert_close(ours.to(dtype)(x), theirs.to(dtype)(x), rtol=0, atol=1e-6)


def test_a_norm_without_weight_is_llama_4s():
    from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm

    torch.manual_seed(4)
    ours, x = RMSNorm(6, 1e-3, weight=False), random(2, 3, 4, 6)
    assert not list(ours.parameters()) and not ours.state_dict()
    assert_same(ours(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt(), (x,))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt(), **EXACT)
    low = torch.randn(5, 32)
    theirs = Llama4TextL2Norm(1e-3)
    torch.testing.assert_close(RMSNorm(32, 1e-3, weight=False)(low), theirs(low), rtol=0, atol=1e-6)


def test_the_backward_without_weight_leaves_the_incoming_gradient_alone():
    x, grad = random(3, 5), torch.randn(3, 5, dtype=torch.float64)
    before = grad.clone()
    rms_norm(x, None, 1e-5).backward(grad)
    assert torch.equal(grad, before)


KINDS = {"rms": RMSNorm, "layer": LayerNorm, "batch": BatchNorm, "group": GroupNorm, "instance": InstanceNorm}


@pytest.mark.parametrize("kind", KINDS)
def test_build_norm_makes_what_was_asked_for(kind):
    settings = {"groups": 2} if kind == "group" else {}
    norm = build_norm(kind, 6, 0.25, **settings)
    assert type(norm) is KINDS[kind]
    assert norm.eps == 0.25
    assert dict(norm.named_parameters())["weight"].shape == (6,)
    assert (getattr(norm, "bias", None) is not None) == (kind != "rms")
    assert getattr(build_norm(kind, 6, 0.25, bias=False, **settings), "bias", None) is None
    assert norm(torch.randn(2, 3, 6)).shape == (2, 3, 6)


def test_build_norm_passes_the_offset_on():
    norm = build_norm("rms", 4, 1e-6, unit_offset=True)
    assert torch.equal(norm.weight, torch.zeros(4))
    x = torch.randn(3, 4)
    torch.testing.assert_close(norm(x), RMSNorm(4, 1e-6)(x))


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        (("layers", 4, 1e-6), {}, "'layers'.*rms, layer"),
        (("layer", 4, 1e-6), {"unit_offset": True}, "unit_offset"),
        (("layer", 4, 1e-6), {"groups": 2}, "groups"),
        (("group", 4, 1e-6), {}, "groups"),
        (("group", 4, 1e-6), {"groups": 3}, "3 groups"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, settings, words):
    with pytest.raises(HanlinError, match=words):
        build_norm(*arguments, **settings)


def test_an_offset_of_no_weight_is_refused():
    with pytest.raises(HanlinError, match="weight=False"):
        RMSNorm(4, weight=False, unit_offset=True)


def test_deepnorm_constants_are_the_papers():
    """arXiv:2203.00555, figure 2, written once more: logs and products in the place of powers."""
    found = deepnorm_constants(6, 12)
    both = math.exp((4 * math.log(6) + math.log(12)) / 16)
    for a, b in zip(found, (0.81 * both, 0.87 / both, math.sqrt(6.0), 1 / math.sqrt(12.0)), strict=True):
        assert math.isclose(a, b, rel_tol=1e-12)
    encoder, decoder = deepnorm_constants(8, 0), deepnorm_constants(0, 8)
    assert encoder[:2] == decoder[2:] and encoder[2:] == decoder[:2] == (None, None)
    assert math.isclose(encoder.encoder_alpha, 2.0) and math.isclose(encoder.encoder_beta, 64**-0.25)
    for bad in ((0, 0), (-1, 3)):
        with pytest.raises(HanlinError, match="layers"):
            deepnorm_constants(*bad)
