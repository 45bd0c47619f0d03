"""Norm, rotation and gated unit against plain autograd in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

from hanlin.nn.feed_forward import SwiGLU, swiglu
from hanlin.nn.norms import RMSNorm, rms_norm
from hanlin.nn.rope import inverse_frequencies, rope_tables, rotate


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours, plain, inputs, tolerance: float = 1e-10):
    """Values and gradients along a random direction."""
    torch.manual_seed(0)
    out, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    direction = torch.randn_like(out)
    pairs = zip(
        torch.autograd.grad(out, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (2, 3, 4, 6), (0, 5)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(shape, eps):
    inputs = (random(*shape), random(shape[-1]))
    assert_same(
        lambda x, w: rms_norm(x, w, eps),
        lambda x, w: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w,
        inputs,
    )


def test_rms_norm_passes_gradcheck():
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (random(3, 4), random(4)))


def test_rms_norm_of_strided_input():
    x, w = random(4, 6, 5), random(4)
    assert_same(
        lambda x, w: rms_norm(x.transpose(0, 2), w, 1e-6),
        lambda x, w: F.rms_norm(x.transpose(0, 2), (4,), w, 1e-6),
        (x, w),
    )


def test_rms_norm_keeps_fp32_statistics_in_bf16():
    torch.manual_seed(0)
    layer = RMSNorm(4096)
    x = (torch.randn(2, 4096) * 100 + 1000).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = F.rms_norm(x.double(), (4096,), layer.weight.double(), 1e-6)
    assert ((out.double() - expected) / expected).abs().max() <= 2**-8  # one rounding to bf16


@pytest.mark.parametrize("shape", [(6,), (3, 8), (2, 3, 10), (0, 4)])
def test_swiglu(shape):
    def plain(x):
        gate, up = x.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up

    assert_same(swiglu, plain, (random(*shape),))


def test_swiglu_passes_gradcheck():
    assert torch.autograd.gradcheck(swiglu, (random(3, 8),))


@pytest.mark.parametrize("bias", [True, False])
def test_the_feed_forward_layer(bias):
    torch.manual_seed(1)
    layer = SwiGLU(5, 7, bias=bias).double()
    x = random(2, 3, 5)

    def plain(x, *_):
        return layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x))

    assert_same(lambda x, *_: layer(x), plain, (x, *layer.parameters()))


def turned_by_hand(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """The rotation as a product of complex numbers."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[..., None, None] * frequencies
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize("head_dim", [2, 4, 10, 64])
@pytest.mark.parametrize("rows", [1, 3])
def test_rotation(head_dim, rows):
    torch.manual_seed(2)
    positions = torch.randint(0, 50, (rows, 7))
    tables = rope_tables(positions, inverse_frequencies(head_dim, 10_000.0), torch.float64)
    inputs = (random(3, 7, 2, head_dim),)
    assert_same(lambda x: rotate(x, *tables), lambda x: turned_by_hand(x, positions, 10_000.0), inputs, 2e-5)


def test_rotation_passes_gradcheck():
    tables = rope_tables(torch.arange(3)[None], inverse_frequencies(4, 100.0), torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, *tables), (random(2, 3, 1, 4),))


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    torch.manual_seed(3)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    inverse = inverse_frequencies(16, 1000.0)

    def at(x, place):
        return rotate(x, *rope_tables(torch.tensor([[place]]), inverse, torch.float64))

    assert math.isclose(at(q, 40).norm(), q.norm(), rel_tol=1e-6)
    near, far = (float((at(q, p + 3) * at(k, p)).sum()) for p in (0, 500))
    assert math.isclose(near, far, rel_tol=1e-4)


def test_angles_stay_exact_at_far_positions_in_bf16():
    positions = torch.tensor([[4095, 4096]])
    inverse = inverse_frequencies(64, 10_000.0)
    low = rope_tables(positions, inverse, torch.bfloat16)
    high = rope_tables(positions, inverse, torch.float64)
    for a, b in zip(low, high, strict=True):
        assert (a.double() - b).abs().max() <= 2**-8
    assert not torch.equal(low[0][:, 0], low[0][:, 1])
