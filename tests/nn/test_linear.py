"""Packed projections: one buffer, of which the named parameters stay views whatever happens to the module."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from hanlin.nn.attention import Attention
from hanlin.nn.linear import Linear, PackedLinear


class Three(PackedLinear):
    packed = ("a", "b", "c")

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = Linear(4, 3, bias=bias), Linear(4, 5, bias=bias), Linear(4, 2, bias=bias)
        self.pack()


def apart(module: Three, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([module.a(x), module.b(x), module.c(x)], -1)


def is_packed(module: Three) -> bool:
    """The parameters lie end to end in one memory."""
    for kind in ("weight", "bias"):
        parts = [getattr(layer, kind) for layer in (module.a, module.b, module.c)]
        if parts[0] is None:
            continue
        storages = {p.untyped_storage().data_ptr() for p in parts}
        ends = [p.data_ptr() + p.numel() * p.element_size() for p in parts]
        if len(storages) > 1 or [p.data_ptr() for p in parts[1:]] != ends[:-1]:
            return False
    return True


def assert_right(module: Three, *, packed: bool = True):
    """The product equals the three apart, in value and gradient, with and without autograd."""
    assert is_packed(module) == packed
    x = torch.randn(2, 3, 4, dtype=module.a.weight.dtype, requires_grad=True)
    inputs = [x, *module.parameters()]
    out, expected = module.project(x), apart(module, x)
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    direction = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * tolerance)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(module.project(x), expected, rtol=0, atol=tolerance)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def module(request) -> Three:
    torch.manual_seed(0)
    return Three(request.param).double()


def test_one_product_equals_three(module):
    assert_right(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_casting_packs_anew(module, dtype):
    assert_right(module.to(dtype))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_step_reaches_the_buffer(module, optimizer):
    before = [p.detach().clone() for p in module.parameters()]
    steps = optimizer(module.parameters(), lr=0.1)
    x = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(3):
        steps.zero_grad()
        module.project(x).square().sum().backward()
        steps.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert_right(module)


def test_gradients_accumulate_over_two_backwards(module):
    x, y = torch.randn(2, 3, 4, dtype=torch.float64)
    for part in (x, y):
        module.project(part).square().sum().backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    apart(module, torch.cat([x, y])).square().sum().backward()
    for a, b in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=0, atol=1e-12)


def test_a_frozen_part_stays_without_gradient(module):
    module.b.weight.requires_grad_(False)
    x = torch.randn(2, 4, dtype=torch.float64)
    module.project(x).square().sum().backward()
    assert module.b.weight.grad is None
    found = module.a.weight.grad.clone()
    module.zero_grad()
    apart(module, x).square().sum().backward()
    torch.testing.assert_close(found, module.a.weight.grad, rtol=0, atol=1e-12)


def test_a_deep_copy_has_a_memory_of_its_own(module):
    clone = deepcopy(module)
    assert_right(clone)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.add_(1.0)
    assert_right(clone)
    assert_right(module)
    assert not torch.equal(clone.a.weight, module.a.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_is_seen(module, assign):
    other = Three(module.a.bias is not None).double()
    module.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)
    assert_right(module, packed=not assign)
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(module.project(x), other.project(x), rtol=0, atol=1e-12)


def test_a_parameter_put_in_from_outside_is_used(module):
    """What sharding and adapters do: the fall-back joins on use, and `pack` makes the views again."""
    module.b.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    assert_right(module, packed=False)
    module.pack()
    assert_right(module)


def test_an_empty_module_is_packed_when_it_gets_memory():
    with torch.device("meta"):
        module = Three()
    module.to_empty(device="cpu")
    source = Three()
    module.load_state_dict(source.state_dict())
    assert_right(module)


def test_the_state_dict_has_the_names_of_the_parts(module):
    expected = [f"{part}.{kind}" for part in "abc" for kind in ("weight", "bias")]
    assert list(module.state_dict()) == [k for k in expected if module.a.bias is not None or k.endswith("weight")]


def test_weights_are_cast_to_the_activations():
    torch.manual_seed(0)
    module = Three()
    x = torch.randn(3, 4).bfloat16()
    out = module.project(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), apart(module, x).float(), rtol=0, atol=0.02)
    out.sum().backward()
    assert module.a.weight.grad.dtype == torch.float32


def test_a_layer_of_attention_is_packed_too():
    layer = Attention(8, 4, 2, 4, qkv_bias=True).double()
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    expected = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], -1)
    torch.testing.assert_close(layer.project(x), expected, rtol=0, atol=1e-12)
