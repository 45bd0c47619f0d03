"""Attention over parts of the keys, merged, is attention over all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.nn.attention import Scores, plain_attention
from hanlin.nn.masks import Causal
from hanlin.nn.partial_attention import attend_part, merge


@settings(max_examples=100, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 20), max_size=3).map(sorted),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_parts_merge_to_the_whole(cuts, heads, softcap, seed):
    torch.manual_seed(seed)
    q = torch.randn(heads[0], 3, 8, dtype=torch.float64) * 4
    k, v = torch.randn(heads[1], 20, 8, dtype=torch.float64), torch.randn(heads[1], 20, 6, dtype=torch.float64)
    bias = torch.zeros(1, 3, 20, dtype=torch.float64).masked_fill_(torch.rand(1, 3, 20) < 0.3, -torch.inf)
    bias[..., 0] = 0.0
    found = None
    for begin, end in zip([0, *cuts], [*cuts, 20], strict=True):
        if begin < end:
            part = slice(begin, end)
            found = merge(found, attend_part(q, k[:, part], v[:, part], bias[..., part], scale=0.5, softcap=softcap))
    assert found is not None
    whole = plain_attention(q[None], k[None], v[None], Scores(0.5, Causal(), softcap), bias)[0]
    torch.testing.assert_close(found[0], whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_a_part_that_nobody_sees_changes_nothing(first):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    seen = attend_part(q, k, v, None, scale=0.3)
    hidden = attend_part(q, k, v, torch.full((1, 3, 5), -torch.inf), scale=0.3)
    assert (hidden[0] == 0).all() and (hidden[1] == -torch.inf).all()
    torch.testing.assert_close(merge(hidden, seen) if first else merge(seen, hidden), seen, rtol=0, atol=0)
