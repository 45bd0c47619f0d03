"""The passes of a training step equal their twins in torch, whoever computes them and however often."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanlin.kernels import training
from hanlin.kernels.cross_entropy import cross_entropy, cross_entropy_twin
from hanlin.kernels.library import library
from hanlin.kernels.rows import rms_norm_twin, rotate_twin, swiglu_twin

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.integers(1, 70) | st.sampled_from([128, 257])
ROWS = st.integers(0, 5) | st.sampled_from([63, 64, 65, 200])  # the sums of 64 rows are kept apart
SEEDS = st.integers(0, 2**31)


def assert_close(found: Tensor | None, expected: Tensor, dtype: torch.dtype, atol: float = 1e-5) -> None:
    assert found is not None
    assert found.shape == expected.shape
    rtol = 2e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.float(), expected.float(), rtol=rtol, atol=atol)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * 3).to(dtype)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, hidden=SIZES, dtype=DTYPES, seed=SEEDS)
def test_swiglu_and_its_gradient(rows, hidden, dtype, seed):
    torch.manual_seed(seed)
    x, grad = draw(rows, 2 * hidden, dtype=dtype), draw(rows, hidden, dtype=dtype)
    assert_close(training.swiglu(x), swiglu_twin(x), dtype)
    assert_close(training.swiglu_backward(x, grad), training.swiglu_backward_twin(x, grad), dtype)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, width=SIZES, dtype=DTYPES, weighted=st.booleans(), seed=SEEDS)
def test_norm_and_its_gradients(rows, width, dtype, weighted, seed):
    torch.manual_seed(seed)
    x, grad = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype)
    weight = torch.randn(width) if weighted else None  # fp32 beside bf16: mixed precision
    made = training.norm(x, weight, 1e-5)
    assert made is not None
    assert_close(made[0], rms_norm_twin(x.float(), weight, 1e-5).to(dtype), dtype)
    found = training.norm_backward(x, weight, made[1], grad, of_weight=weighted)
    assert found is not None
    one = torch.ones(width) if weight is None else weight
    grad_x, grad_weight = training.norm_backward_twin(x, one, made[1], grad)
    assert_close(found[0], grad_x, dtype, atol=1e-4)
    if weighted:
        assert_close(found[1], grad_weight, torch.float32, atol=1e-4 * max(1, rows) ** 0.5)
    else:
        assert found[1] is None


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 3), length=st.integers(1, 40), heads=st.integers(1, 4), half=st.integers(1, 40),
    still=st.integers(0, 5), dtype=DTYPES, seed=SEEDS,
)  # fmt: skip
def test_turn_there_and_back_of_a_slice(rows, length, heads, half, still, dtype, seed):
    torch.manual_seed(seed)
    x = draw(rows, length, heads + 1, 2 * half + still, dtype=dtype)[:, :, :heads]
    angle = torch.randn(1, length, 1, half)
    cos = torch.cat([angle.cos(), angle.cos()], -1).to(dtype)
    sin = torch.cat([-angle.sin(), angle.sin()], -1).to(dtype)
    atol = 1e-5 if dtype == torch.float32 else 3e-2
    assert_close(training.turn(x, cos, sin, 1.0), rotate_twin(x, cos, sin), dtype, atol)
    assert_close(training.turn(x, cos, sin, -1.0), rotate_twin(x, cos, -sin), dtype, atol)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 6), vocabulary=st.integers(1, 70) | st.sampled_from([128, 1003]), dtype=DTYPES,
    smoothing=st.sampled_from([0.0, 0.1]), z_loss=st.sampled_from([0.0, 1e-3]), seed=SEEDS,
)  # fmt: skip
def test_cross_entropy_and_its_slope(rows, vocabulary, dtype, smoothing, z_loss, seed):
    torch.manual_seed(seed)
    z, targets = draw(rows, vocabulary, dtype=dtype), torch.randint(vocabulary, (rows,))
    total, slope = cross_entropy_twin(z, targets, smoothing=smoothing, z_loss=z_loss)
    kept = z.clone()
    found = cross_entropy(z, targets, smoothing=smoothing, z_loss=z_loss, wanted=False)
    assert found is not None and found[1] is None and torch.equal(z, kept)
    assert_close(found[0], total, torch.float32)
    found = cross_entropy(z, targets, smoothing=smoothing, z_loss=z_loss, wanted=True)
    assert found is not None and found[1] is z
    assert_close(found[0], total, torch.float32)
    assert_close(found[1], slope, dtype, atol=1e-6)


def test_a_target_outside_of_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match="a target of 8, but there are 8 tokens"):
        cross_entropy(torch.randn(2, 8), torch.tensor([0, 8]), smoothing=0.0, z_loss=0.0, wanted=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_shows_in_the_loss(bad):
    z = torch.zeros(1, 40)
    z[0, 21] = bad
    found = cross_entropy(z, torch.tensor([3]), smoothing=0.0, z_loss=0.0, wanted=True)
    assert found is not None and not found[0].isfinite()


@pytest.mark.parametrize("count", [1, 17, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_added_to_a_wider_one(count, dtype):
    low, wide = draw(count, dtype=dtype), draw(count, dtype=torch.float32)
    expected = wide + low.float()
    assert training.widen(low, wide, add=True)
    assert torch.equal(wide, expected)
    assert training.widen(low, wide, add=False)
    assert torch.equal(wide, low.float())


def test_what_has_no_kernel_is_left_to_torch():
    double = torch.randn(4, 8, dtype=torch.float64)
    assert training.swiglu(double) is None
    assert training.norm(double, torch.ones(8), 1e-5) is None
    assert cross_entropy(double, torch.zeros(4, dtype=torch.int64), smoothing=0.0, z_loss=0.0, wanted=True) is None
    assert training.swiglu(torch.randn(4, 16)[:, ::2]) is None
    assert training.swiglu_backward(torch.randn(4, 16), torch.randn(4, 8).bfloat16()) is None
    assert not training.widen(double, double.clone(), add=True)


def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(0)
    x, grad, weight = torch.randn(1000, 384), torch.randn(1000, 384), torch.randn(384)
    targets, threads, found = torch.randint(384, (1000,)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            made = training.norm(x, weight, 1e-5)
            assert made is not None
            back = training.norm_backward(x, weight, made[1], grad, of_weight=True)
            loss = cross_entropy(x.clone(), targets, smoothing=0.1, z_loss=1e-3, wanted=True)
            assert back is not None and loss is not None
            found.append([*made, *back, loss[1], training.swiglu_backward(x, grad[:, :192])])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
