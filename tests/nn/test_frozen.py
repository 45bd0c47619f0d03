"""A frozen model gives the logits of the plain one, and holds its weights once."""

from copy import deepcopy

import pytest
import torch

from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer
from hanlin.nn.frozen import Product, can_freeze, freeze
from hanlin.nn.linear import Linear, PackedLinear

pytestmark = pytest.mark.skipif(not can_freeze(), reason="oneDNN's layout is used on x86 only")


def make_model(tied: bool) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "qwen2",
        depth=2,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=16, qkv_bias=True, output_bias=True),
        feed_forward=FeedForwardConfig(96, bias=True),
        vocab_size=131,
        width=64,
        tied_embeddings=tied,
    )
    model = Transformer(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_product_is_the_linear_map(rows, dtype, tolerance):
    x, weight, bias = torch.randn(rows, 2, 77), torch.randn(53, 77), torch.randn(53)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    for b in (bias, None):
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        error = (Product(weight, b)(x).double() - exact).abs().max()
        assert error <= tolerance * exact.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_model_gives_the_same_logits(tied):
    plain = make_model(tied)
    frozen = deepcopy(plain)
    assert freeze(frozen)
    for length in (1, 21):
        ids = torch.randint(0, 131, (3, length))
        torch.testing.assert_close(frozen(ids).logits, plain(ids).logits, rtol=0, atol=5e-5)
    assert frozen.parameter_count() == plain.parameter_count()
    assert [n for n, _ in frozen.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize("tied", [True, False])
def test_the_plain_weights_are_given_back(tied):
    model = make_model(tied)
    freeze(model)
    for module in model.modules():
        if isinstance(module, Linear):
            assert module.weight.is_meta != (tied and module is model.lm_head)
        if isinstance(module, PackedLinear):
            assert module.product is not None
    assert not model.model.embed_tokens.weight.is_meta


def test_what_onednn_does_not_compute_stays_plain():
    model = make_model(True).double()
    assert not freeze(model)
    assert not any(p.is_meta for p in model.parameters())
