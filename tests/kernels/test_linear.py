"""The packed product equals its twin in torch, and a row's result does not depend on the rows beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.kernels.library import library
from hanlin.kernels.linear import PackedProduct, linear_twin

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")

DTYPES = [torch.float32, torch.bfloat16]
SIZES = st.integers(1, 100) | st.sampled_from([192, 256, 320])


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 70), inputs=SIZES, outputs=SIZES, biased=st.booleans(), sliced=st.booleans(),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_product_equals_its_twin(rows, inputs, outputs, biased, sliced, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(rows, 2, inputs).to(dtype)[:, 1] if sliced else torch.randn(rows, inputs).to(dtype)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype) if biased else None
    found, expected = PackedProduct(weight, bias)(x), linear_twin(x, weight, bias)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-5 * inputs**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(77, 53), (256, 1100), (1024, 900)])
def test_a_row_knows_no_other_row(dtype, inputs, outputs):
    torch.manual_seed(0)
    product = PackedProduct(torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype))
    x = torch.randn(75, inputs).to(dtype)
    whole = product(x)
    for size in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 74):
        for begin in (0, 75 - size):
            assert torch.equal(product(x[begin : begin + size]), whole[begin : begin + size])


def test_it_keeps_nothing_of_the_given_weights():
    weight, x = torch.randn(40, 24), torch.randn(3, 24)
    product = PackedProduct(weight, None)
    before = product(x)
    weight.zero_()
    assert torch.equal(product(x), before)


def test_what_does_not_fit_is_refused():
    product = PackedProduct(torch.randn(40, 24), None)
    for wrong in (torch.randn(3, 23), torch.randn(3, 24).bfloat16()):
        with pytest.raises(ValueError, match=r"expected torch.float32 of \(..., 24\)"):
            product(wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_row_breaks_no_other(dtype):
    x = torch.randn(5, 40).to(dtype)
    x[2, 3] = float("nan")
    y = PackedProduct(torch.randn(70, 40).to(dtype), None)(x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()
