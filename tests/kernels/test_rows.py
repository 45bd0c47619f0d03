"""RMS norm, rotary turn and SwiGLU of the kernels equal their twins in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanlin.kernels.library import library
from hanlin.kernels.rows import rms_norm, rms_norm_twin, rotate, rotate_twin, swiglu, swiglu_twin

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.integers(1, 70) | st.sampled_from([128, 192, 257])


def assert_close(found: Tensor | None, expected: Tensor) -> None:
    """bf16 may round the last bit the other way: 2^-8 of the number."""
    assert found is not None
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    rtol = 1e-5 if found.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-5)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * 3).to(dtype)


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(0, 9), width=SIZES, dtype=DTYPES, seed=st.integers(0, 2**31))
def test_norm_equals_its_twin(rows, width, dtype, seed):
    torch.manual_seed(seed)
    x, weight = draw(rows, width, dtype=dtype), draw(width, dtype=dtype)
    assert_close(rms_norm(x, weight, 1e-6), rms_norm_twin(x, weight, 1e-6))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 4), length=st.integers(1, 4), heads=st.integers(1, 5), width=SIZES, dtype=DTYPES,
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_norm_of_a_slice_of_the_projection(rows, length, heads, width, dtype, seed):
    torch.manual_seed(seed)
    wide, weight = draw(rows, length, heads + 3, width, dtype=dtype), draw(width, dtype=dtype)
    for x in (wide[:, :, :heads], wide[:, :, 3:]):
        assert_close(rms_norm(x, weight, 1e-5), rms_norm_twin(x, weight, 1e-5))


def test_a_slice_that_is_no_group_of_rows_is_left_to_torch():
    weight = torch.ones(8)
    assert rms_norm(torch.randn(2, 3, 4, 16)[..., ::2], weight, 1e-5) is None
    assert rms_norm(torch.randn(3, 2, 8).transpose(0, 1), weight, 1e-5) is None
    assert rms_norm(torch.randn(2, 8, dtype=torch.float64), weight.double(), 1e-5) is None
    assert rms_norm(torch.randn(2, 8).bfloat16(), weight, 1e-5) is None


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 3), length=st.integers(1, 4), heads=st.integers(1, 4), half=SIZES, still=st.integers(0, 20),
    shared=st.booleans(), sliced=st.booleans(), dtype=DTYPES, seed=st.integers(0, 2**31),
)  # fmt: skip
def test_turn_equals_its_twin(rows, length, heads, half, still, shared, sliced, dtype, seed):
    torch.manual_seed(seed)
    x = draw(rows, length, heads + 2, 2 * half + still, dtype=dtype)
    x = x[:, :, 2:] if sliced else x
    cos, sin = (draw(1 if shared else rows, length, 1, 2 * half, dtype=dtype) for _ in range(2))
    atol = 1e-4 if dtype == torch.float32 else 0.3  # of a difference between two numbers of up to 100
    found, expected = rotate(x, cos, sin), rotate_twin(x, cos, sin)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=atol)


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(0, 9), hidden=SIZES, scale=st.sampled_from([1, 30]), dtype=DTYPES, seed=st.integers(0, 2**31))
def test_gate_equals_its_twin(rows, hidden, scale, dtype, seed):
    torch.manual_seed(seed)
    gate_up = draw(rows, 1, 2 * hidden, dtype=dtype) * scale
    assert_close(swiglu(gate_up), swiglu_twin(gate_up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_threads_share_equal_each_row_alone(dtype):
    loaded = library()
    assert loaded is not None
    loaded.long.hanlin_threads(3)
    wide, weight = draw(1, 517, 7, 80, dtype=dtype), draw(80, dtype=dtype)
    x = wide[:, :, 2:]
    cos, sin = draw(1, 517, 1, 64, dtype=dtype), draw(1, 517, 1, 64, dtype=dtype)
    shared = rms_norm(x, weight, 1e-6), rotate(x, cos, sin), swiglu(wide.flatten(2))
    for i in (0, 1, 200, 516):
        at = slice(i, i + 1)
        alone = (
            rms_norm(x[:, at], weight, 1e-6),
            rotate(x[:, at], cos[:, at], sin[:, at]),
            swiglu(wide[:, at].flatten(2)),
        )
        for many, one in zip(shared, alone, strict=True):
            assert many is not None and one is not None
            assert torch.equal(many[:, at], one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(dtype):
    bad = torch.tensor([[float("nan"), 1, 1, 1], [float("inf"), 1, 1, 1]], dtype=dtype)
    normed, gated = rms_norm(bad, torch.ones(4, dtype=dtype), 1e-6), swiglu(bad)
    assert normed is not None and gated is not None
    assert normed[:, 0].isnan().all()
    assert gated[0, 0].isnan() and gated[1, 0].isinf()
