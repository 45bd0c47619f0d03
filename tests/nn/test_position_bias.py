"""Position biases against loops over the papers' rules, BLOOM and T5."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from hanlin.core.errors import HanlinError
from hanlin.nn.position_bias import Alibi, RelativeBias, alibi_slopes, relative_buckets

POSITIONS = st.lists(st.lists(st.integers(0, 300), min_size=4, max_size=4), min_size=1, max_size=3)


def slopes_by_hand(heads: int) -> list[float]:
    """The paper's recursion: a power of two is a geometric series, others borrow every other slope of twice as many."""
    if math.log2(heads).is_integer():
        return [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]
    below = 2 ** int(math.log2(heads))
    return slopes_by_hand(below) + slopes_by_hand(2 * below)[0::2][: heads - below]


@pytest.mark.parametrize("heads", [*range(1, 41), 112])
def test_slopes_are_those_of_the_paper_and_of_bloom(heads):
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(slopes_by_hand(heads)), rtol=1e-6, atol=0)
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), theirs, rtol=4e-6, atol=0)


@given(st.integers(1, 20), POSITIONS, st.lists(st.integers(0, 300), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_alibi_is_minus_slope_times_distance(heads, q, k):
    bias = Alibi(heads)(torch.tensor(q), torch.tensor([k]))
    slopes = slopes_by_hand(heads)
    expected = [[[[-slopes[h] * abs(i - j) for j in k] for i in row] for h in range(heads)] for row in q]
    torch.testing.assert_close(bias.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("heads", [4, 6, 16])
def test_alibi_gives_the_attention_of_bloom(heads):
    """Theirs is slope * key position, another by a number for each query: equal after the causal softmax."""
    torch.manual_seed(0)
    positions, scores = torch.arange(30)[None], torch.randn(2, heads, 30, 30, dtype=torch.float64)
    future = torch.full((30, 30), -math.inf).triu(1)
    theirs = build_alibi_tensor(torch.ones(2, 30), heads, torch.float64).view(2, heads, 1, 30)
    ours = Alibi(heads)(positions, positions)
    expected = (scores + theirs + future).softmax(-1)
    # up to 8 heads slopes are powers of two, and exact; beyond, BLOOM rounds them to fp32 once a power
    torch.testing.assert_close(
        (scores + ours + future).softmax(-1), expected, rtol=0, atol=1e-12 if heads < 16 else 1e-5
    )


def test_alibi_on_meta_has_its_slopes():
    with torch.device("meta"):
        alibi = Alibi(4)
    assert alibi(torch.tensor([[2]]), torch.tensor([[0]])).flatten().tolist() == [-0.5, -0.125, -0.03125, -0.0078125]


SIZES = st.tuples(st.sampled_from([4, 8, 12, 32]), st.integers(20, 200))


def bucket_by_hand(ahead: int, buckets: int, longest: int, bidirectional: bool) -> set[int]:
    """The rule in exact integers. On a tie, (d/e)^(n-e) = (longest/e)^j, rounding may give j or j - 1: both."""
    first, distance = 0, max(-ahead, 0)
    if bidirectional:
        buckets //= 2
        first, distance = (buckets if ahead > 0 else 0), abs(ahead)
    exact = buckets // 2
    if distance < exact:
        return {first + distance}
    far = buckets - exact

    def side(j):  # sign of (d/e)^far - (longest/e)^j
        return distance**far * exact**j - longest**j * exact**far

    j = max(j for j in range(far + 1) if side(j) >= 0)
    tie = {j - 1} if j > 0 and side(j) == 0 else set()
    return {first + exact + min(x, far - 1) for x in {j} | tie}


@given(st.integers(-500, 500), SIZES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_buckets_are_those_of_the_paper(ahead, sizes, bidirectional):
    found = int(relative_buckets(torch.tensor(ahead), *sizes, bidirectional=bidirectional))
    assert found in bucket_by_hand(ahead, *sizes, bidirectional)


@given(SIZES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_buckets_are_exactly_those_of_t5(sizes, bidirectional):
    ahead = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(ahead, bidirectional, *sizes)
    assert torch.equal(relative_buckets(ahead, *sizes, bidirectional=bidirectional), expected)


def t5(buckets: int, longest: int, *, decoder: bool) -> tuple[T5Attention, RelativeBias]:
    config = T5Config(
        d_model=8, d_kv=4, num_heads=3, relative_attention_num_buckets=buckets, is_decoder=decoder,
        relative_attention_max_distance=longest,
    )  # fmt: skip
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = RelativeBias(buckets, 3, max_distance=longest, bidirectional=not decoder)
    ours.embedding.load_state_dict(theirs.relative_attention_bias.state_dict())
    return theirs, ours


@pytest.mark.parametrize("decoder", [False, True])
def test_the_bias_is_that_of_t5_with_and_without_a_cache(decoder):
    theirs, ours = t5(8, 20, decoder=decoder)
    positions = torch.arange(40)[None]
    expected = theirs.compute_bias(40, 40)
    assert torch.equal(ours(positions, positions), expected)
    assert torch.equal(ours(positions[:, 33:], positions), expected[:, :, 33:])
    rows = torch.stack([positions[0, 5:9], positions[0, 20:24]])
    assert torch.equal(ours(rows, positions), torch.cat([expected[:, :, 5:9], expected[:, :, 20:24]]))
    weight = torch.randn_like(expected)
    (grad,) = torch.autograd.grad((ours(positions, positions) * weight).sum(), ours.embedding.weight)
    (their_grad,) = torch.autograd.grad((expected * weight).sum(), theirs.relative_attention_bias.weight)
    torch.testing.assert_close(grad, their_grad, rtol=1e-5, atol=1e-4)


@given(POSITIONS, POSITIONS, SIZES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_bias_of_a_pair_is_its_buckets_row(q, k, sizes, bidirectional):
    k = k[:1]
    module = RelativeBias(sizes[0], 2, max_distance=sizes[1], bidirectional=bidirectional)
    bias = module(torch.tensor(q), torch.tensor(k))
    assert bias.shape == (len(q), 2, 4, 4)
    for r, row in enumerate(q):
        for i, a in enumerate(row):
            for j, b in enumerate(k[0]):
                rows = [module.embedding.weight[x] for x in bucket_by_hand(b - a, *sizes, bidirectional)]
                assert any(torch.equal(bias[r, :, i, j], row) for row in rows)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Alibi(0), "0 heads"),
        (lambda: RelativeBias(2, 4), "2 buckets"),
        (lambda: RelativeBias(1, 4, bidirectional=False), "1 buckets"),
        (lambda: RelativeBias(32, 4, max_distance=8), "a distance above 8"),
    ],
)
def test_wrong_arguments_are_refused(make, words):
    with pytest.raises(HanlinError, match=words):
        make()
