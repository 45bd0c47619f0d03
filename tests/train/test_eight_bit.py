"""8-bit states: the code by its definition, blocks by brute force, AdamW and Muon beside their 32-bit forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanlin.train.eight_bit import BLOCK, AdamW8bit, code, dequantise, empty_state, quantise
from hanlin.train.muon import Muon

CPU = torch.device("cpu")


def test_the_codes_are_256_numbers_that_get_denser_towards_zero():
    """Table values of the paper's figure: 1 and 0 exactly, the smallest sizes 10^-6, half of all below 0.1."""
    for signed in (True, False):
        numbers = code(signed, CPU)
        assert len(numbers) == 256 and numbers.unique().numel() == 256
        assert numbers[-1] == 1 and (numbers == 0).sum() == 1
        assert numbers.abs()[numbers != 0].min() < 1e-6
    signed = code(True, CPU)
    without_one = signed[:-1]  # the only number without its negative
    torch.testing.assert_close(without_one, -without_one.flip(0), rtol=0, atol=0)
    assert code(False, CPU).min() == 0


def twin(x, signed):
    """Each number by itself: the nearest of all codes to x / largest."""
    numbers, flat, out = code(signed, CPU), x.reshape(-1).float(), []
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        largest = block.abs().max()
        relative = block / largest if largest > 0 else block
        indices = (relative[:, None] - numbers).abs().argmin(1)
        if not signed:  # what is above zero stays above zero
            indices = torch.where((relative > 0) & (numbers[indices] == 0), 1, indices)
        out.append(numbers[indices] * largest)
    return torch.cat(out).view(x.shape)


@given(st.integers(1, 900), st.booleans(), st.integers(0, 10_000), st.sampled_from([1e-20, 1e-3, 1.0, 1e9]))
def test_blocks_hold_the_nearest_codes(n, signed, seed, size):
    """Against brute force; a tie may go either way, so the distance is compared: equal within 1e-6 of the block."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).pow(3) * size
    x = x if signed else x.square().sqrt()
    x[::7] = 0.0
    codes, largest = quantise(x, signed=signed)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and len(largest) == -(-n // BLOCK)
    found = dequantise(codes, largest, signed=signed)
    bound = 1e-6 * float(x.abs().max())
    torch.testing.assert_close((found - x).abs(), (twin(x, signed) - x).abs(), rtol=0, atol=bound)
    assert torch.equal(found == 0, twin(x, signed) == 0)


def test_blocks_do_not_see_each_other():
    x = torch.randn(2 * BLOCK)
    codes, _ = quantise(x, signed=True)
    x[:BLOCK] *= 1e6
    assert torch.equal(quantise(x, signed=True)[0], codes)


def test_an_empty_state_is_zeros_also_for_no_numbers_at_all():
    for shape in [(0,), (3,), (5, 300)]:
        x = torch.empty(shape)
        for signed in (True, False):
            assert torch.equal(dequantise(*empty_state(x, signed=signed), signed=signed), torch.zeros(shape))
    assert quantise(torch.empty(0), signed=True)[0].shape == (0,)


def reference_step(p, g, m, v, t, *, lr, betas, eps, decay):
    """AdamW by its formula, over moments that went through brute-force blocks."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p * (1 - lr * decay) - lr * step, twin(m, True), twin(v, False)


def test_adamw_is_the_formula_over_quantised_moments():
    """20 steps; the moved distance agrees to 1e-3 (ties of rounding)."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(37, 21))
    start, theirs = ours.detach().clone(), ours.detach().clone()
    optimizer = AdamW8bit([ours], lr=0.01, weight_decay=0.1)
    m, v = torch.zeros_like(theirs), torch.zeros_like(theirs)
    for t in range(1, 21):
        ours.grad = torch.randn_like(ours) * torch.rand_like(ours) ** 3
        optimizer.step()
        theirs, m, v = reference_step(theirs, ours.grad, m, v, t, lr=0.01, betas=(0.9, 0.95), eps=1e-8, decay=0.1)
    assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_lands_near_its_32_bit_form(dtype):
    """A badly scaled quadratic: both come to the minimum; the ways differ by a few percent."""
    torch.manual_seed(0)
    scales = torch.logspace(-1, 1, 600, dtype=dtype)
    target, start = torch.randn(600, dtype=dtype), torch.zeros(600, dtype=dtype)
    found = []
    for kind in (AdamW8bit, torch.optim.AdamW):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
        for _ in range(200):
            optimizer.zero_grad()
            (scales * (weight - target).square()).sum().backward()
            optimizer.step()
        found.append(weight.detach())
    assert (found[0] - target).norm() < 0.05 * target.norm()
    assert (found[0] - found[1]).norm() < 0.05 * target.norm()


def test_a_gradient_that_dies_out_does_not_make_the_step_explode():
    """One large number in the block rounds small second moments; none becomes zero under a first moment that is not."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(BLOCK))
    optimizer = AdamW8bit([weight], lr=1e-3)
    size = torch.full((BLOCK,), 1e-3)
    size[0] = 10.0
    for step in range(40):
        weight.grad = torch.randn(BLOCK) * size * (0.0 if step > 20 else 1.0)
        before = weight.detach().clone()
        optimizer.step()
        assert (weight - before).abs().max() < 1e-2  # ten times the rate


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    start, gradients = torch.randn(1000), torch.randn(5, 1000)
    found = []
    for size in (BLOCK, 1 << 20):
        monkeypatch.setattr("hanlin.train.eight_bit.CHUNK", size)
        weight = torch.nn.Parameter(start.clone())
        optimizer = AdamW8bit([weight], lr=0.1)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


def test_a_transposed_parameter_is_updated_in_place():
    torch.manual_seed(0)
    base = torch.randn(30, 20)
    plain, turned = torch.nn.Parameter(base.t().contiguous()), torch.nn.Parameter(base.t())
    gradient = torch.randn(20, 30)
    for weight in (plain, turned):
        weight.grad = gradient.clone()
        AdamW8bit([weight], lr=0.1).step()
    torch.testing.assert_close(turned.detach(), plain.detach(), rtol=0, atol=0)


def test_muon_with_8_bits_follows_muon():
    """Ten steps on random gradients, relative L2 of the moved distance <= 3 %; a byte a number and 4 a block."""
    torch.manual_seed(0)
    start, gradients = torch.randn(48, 64), torch.randn(10, 48, 64)
    found = []
    for bits in (8, 32):
        weight = torch.nn.Parameter(start.clone())
        optimizer = Muon([weight], lr=0.02, state_bits=bits)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        found.append((weight.detach(), optimizer.state[weight]))
    assert (found[0][0] - found[1][0]).norm() < 0.03 * (found[1][0] - start).norm()
    assert sum(t.numel() * t.element_size() for t in found[0][1].values()) == 48 * 64 + 4 * 48 * 64 // BLOCK
