"""Decode attention over the cache equals its twin in torch, writes what it should, and keeps rows apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.kernels.attention import DecodeStep, attend_twin
from hanlin.kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")


def make(lengths, slot, kv_heads, group, width, value_width, dtype, spare=1):
    """Queries, new keys and values (slices of one projection where they can be), and a cache with NaN past each end."""
    rows, room, heads = len(lengths), max(lengths) + 3, kv_heads * group
    keys = torch.full((slot + rows + spare, kv_heads, room, width), float("nan")).to(dtype)
    values = torch.full((slot + rows + spare, kv_heads, room, value_width), float("nan")).to(dtype)
    for row, length in enumerate(lengths):
        keys[slot + row, :, :length] = torch.randn(kv_heads, length, width)
        values[slot + row, :, :length] = torch.randn(kv_heads, length, value_width)
    if width == value_width:
        qkv = torch.randn(rows, 1, heads + 2 * kv_heads, width).to(dtype)
        return *qkv.split([heads, kv_heads, kv_heads], 2), keys, values
    q, k = (torch.randn(rows, 1, n, width).to(dtype) for n in (heads, kv_heads))
    return q, k, torch.randn(rows, 1, kv_heads, value_width).to(dtype), keys, values


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=5), slot=st.integers(0, 2), kv_heads=st.integers(1, 3),
    group=st.integers(1, 4), width=st.sampled_from([1, 8, 16, 24, 64, 80, 128]),
    value_width=st.sampled_from([None, 5, 48]), window=st.integers(0, 210),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_attention_equals_its_twin(lengths, slot, kv_heads, group, width, value_width, window, dtype, seed):
    torch.manual_seed(seed)
    q, k, v, keys, values = make(lengths, slot, kv_heads, group, width, value_width or width, dtype)
    twin = [keys.clone(), values.clone()]
    found = DecodeStep(lengths, slot).attend(q, k, v, keys, values, scale=0.3, window=window)
    expected = attend_twin(lengths, slot, q, k, v, *twin, scale=0.3, window=window)
    assert found is not None
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-7, 1e-4)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close([keys, values], twin, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_knows_no_other_row(dtype):
    torch.manual_seed(0)
    lengths = [700, 3, 64, 0, 129]
    q, k, v, keys, values = make(lengths, 0, 2, 3, 64, 64, dtype)
    together = DecodeStep(lengths, 0).attend(q, k, v, keys.clone(), values.clone(), scale=0.125, window=0)
    assert together is not None
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = DecodeStep([length], row).attend(q[one], k[one], v[one], keys, values, scale=0.125, window=0)
        assert alone is not None
        assert torch.equal(alone, together[one])


def test_large_scores_do_not_overflow():
    torch.manual_seed(0)
    q, k, v, keys, values = make([150], 0, 1, 2, 16, 16, torch.float32)
    twin = [keys.clone(), values.clone()]
    found = DecodeStep([150], 0).attend(q, k, v, keys, values, scale=1000.0, window=0)
    torch.testing.assert_close(found, attend_twin([150], 0, q, k, v, *twin, scale=1000.0, window=0))


def test_what_it_cannot_read_is_left_alone():
    q, k, v, keys, values = make([4], 0, 2, 2, 16, 16, torch.float32)
    before = keys.clone()
    step = DecodeStep([4], 0)
    assert step.attend(q, k, v, keys.double(), values, scale=1.0, window=0) is None
    assert step.attend(q, k, v, keys.transpose(1, 2), values, scale=1.0, window=0) is None
    assert torch.equal(keys.nan_to_num(), before.nan_to_num())
