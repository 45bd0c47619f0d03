"""8-bit products: torch's own `_scaled_mm`, the emulation and fp32 say the same of them, forward and backward."""

import copy

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.float8 import (
    BACKWARD,
    FORWARD,
    Float8Product,
    float8_linear,
    multiply,
    multiply_emulated,
    quantise,
    use_float8,
    use_plain,
)
from hanlin.nn.frozen import freeze
from hanlin.nn.linear import Linear
from hanlin.nn.routing import RouterConfig
from hanlin.tune.lora import add_lora


def has_float8_products() -> bool:
    """torch's CPU has them, if slow ones, from some version on."""
    try:
        eight = torch.zeros(16, 16).to(FORWARD)
        multiply(eight, eight.t(), torch.ones(()), torch.float32, True)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize(("dtype", "bits", "most"), [(FORWARD, 3, 448.0), (BACKWARD, 2, 57344.0)])
@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e20])
def test_numbers_keep_the_bits_of_their_format_at_any_size(dtype, bits, most, size):
    """The largest is exact; others lie within half a unit in the last place, or of the smallest step."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * size
    eight, inverse = quantise(x, dtype)
    found = eight.float() * inverse
    assert eight.float().abs().max() == most
    smallest = torch.finfo(dtype).smallest_normal * float(inverse)
    unit = torch.maximum(x.abs(), torch.tensor(smallest)) * 2.0 ** -(bits + 1)
    assert ((found - x).abs() <= unit * 1.001).all()


def test_zeros_stay_zeros():
    eight, inverse = quantise(torch.zeros(4, 4), FORWARD)
    assert (eight.float() * inverse == 0).all()


def through(x, dtype):
    """Quantised and back, in fp64: what a product of 8-bit numbers sees."""
    eight, inverse = quantise(x, dtype)
    return eight.double() * inverse.double()


@pytest.mark.parametrize("by", [multiply_emulated, multiply], ids=["emulated", "units"])
@pytest.mark.parametrize("rows", [32, 21])
def test_a_linear_and_its_gradients_are_products_of_quantised_matrices(by, rows):
    """Against fp64 over the same 8-bit numbers: relative L2 1e-5 in fp32. 21 rows are filled up to 32."""
    if by is multiply and not has_float8_products():
        pytest.skip("this torch has no 8-bit products on a CPU")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 48, generator=generator, requires_grad=True)
    weight = torch.randn(64, 48, generator=generator, requires_grad=True)
    bias = torch.randn(64, generator=generator, requires_grad=True)
    grad = torch.randn(rows, 64, generator=generator) * 1e-4
    y = float8_linear(x, weight, bias, by=by)
    y.backward(grad)
    x8, w8, g8 = through(x.detach(), FORWARD), through(weight.detach(), FORWARD), through(grad, BACKWARD)
    for found, expected in (
        (y.detach(), x8 @ w8.T + bias.detach().double()),
        (x.grad, g8 @ w8),
        (weight.grad, g8.T @ x8),
        (bias.grad, grad.double().sum(0)),
    ):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_eight_bits_are_near_the_plain_product():
    """Relative L2: forward 5 %, gradients 10 % (2 bits of fraction); weights stay fp32, activations bf16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 128, generator=generator).bfloat16()
    layer, plain = Linear(128, 96), Linear(128, 96)
    plain.load_state_dict(layer.state_dict())
    layer.product = Float8Product(layer, multiply_emulated)
    found, expected = [], []
    for module, out in ((layer, found), (plain, expected)):
        part = x.clone().requires_grad_()
        y = module(part)
        assert y.dtype == torch.bfloat16
        y.backward(torch.ones_like(y) * 0.01 * torch.arange(96))
        assert module.weight.grad.dtype == torch.float32
        out += [y.detach().float(), part.grad.float(), module.weight.grad, module.bias.grad]
    for one, other, bound in zip(found, expected, (0.05, 0.1, 0.1, 0.01), strict=True):
        assert (one - other).norm() <= bound * other.norm()


def model_of(feed_forward) -> Transformer:
    torch.manual_seed(0)
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8)
    config = ModelConfig.uniform(
        "llama", depth=2, attention=attention, feed_forward=feed_forward, vocab_size=61, width=32
    )
    return Transformer(config)


def train(model, steps=30):
    """Learn a row of ids by heart; returns first and last loss."""
    ids = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(1))
    model.compute_dtype = torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def test_a_model_learns_in_8_bits_as_in_16():
    """And is given back plain, its named weights still views of the fused buffers."""
    model = model_of(FeedForwardConfig(48))
    plain = copy.deepcopy(model)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert len(use_float8(model, emulate=True)) == 2 * 4  # q|k|v, o, gate|up, down
    (first, last), (_, expected) = train(model), train(plain)
    assert last < 0.6 * first and abs(last - expected) < 0.1 * first
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    use_plain(model)
    assert all(getattr(m, "product", None) is None for m in model.modules())


def test_experts_routers_and_the_head_stay_as_they_are():
    model = model_of(ExpertsConfig(32, 4, RouterConfig(2), shared_hidden=48, shared_gate=True))
    chosen = use_float8(model, emulate=True)
    assert model.lm_head.product is None and all(layer.mlp.shared_gate.product is None for layer in model.model.layers)
    assert len(chosen) == 2 * 4
    train(model, steps=2)


def test_adapters_hang_on_8_bit_products():
    model = model_of(FeedForwardConfig(48))
    ids = torch.arange(12)[None]
    use_float8(model, emulate=True)
    before = model(ids).logits
    adapter = add_lora(model, rank=16)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)  # B is 0
    model(ids).logits.square().sum().backward()
    assert all(branch.b.weight.grad.norm() > 0 for branch in adapter.branches.values())


def test_what_cannot_multiply_in_8_bits_is_refused_by_name():
    with pytest.raises(HanlinError, match="the device is `cpu`"):
        use_float8(model_of(FeedForwardConfig(48)))
    with pytest.raises(HanlinError, match=r"model\.layers\.0\.mlp multiplies by a matrix of 88 x 32"):
        use_float8(model_of(FeedForwardConfig(44)), emulate=True)
    model = model_of(FeedForwardConfig(48))
    if freeze(model):
        with pytest.raises(HanlinError, match="frozen for generation"):
            use_float8(model, emulate=True)
