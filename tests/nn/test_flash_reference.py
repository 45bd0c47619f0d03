"""The tiled reference is exact, forward and backward, and needs memory for T rows where the naive form needs T x T."""

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.nn.flash_reference import PeakBytes, flash_attention
from hanlin.nn.masks import (
    Bidirectional,
    Causal,
    Chunk,
    Dilated,
    Local,
    Padding,
    Permutation,
    Prefix,
    SameDocument,
    Window,
)

LENGTH = 23
MASKS = {
    "none": None,
    "bidirectional": Bidirectional(),
    "causal": Causal(),
    "window": Causal() & Window(5),
    "chunk": Causal() & Chunk(6),
    "dilated": Local(2) | Dilated(7),
    "prefix": Prefix((3, 11)) | Causal(),
    "documents": Causal() & SameDocument((torch.arange(LENGTH) // 9).expand(2, -1)),
    "padding, one row all of it": Padding(torch.arange(LENGTH) < torch.tensor([[0], [17]])),
    "query stream": Permutation(torch.stack([torch.randperm(LENGTH) for _ in range(2)]), strict=True),
}


def naive(q, k, v, mask, scale=None):
    """softmax(q k^T) v with every matrix written out; zero where nothing is seen."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    visible = (mask or Bidirectional()).dense(torch.arange(q.shape[2]), torch.arange(k.shape[2]))[:, None]
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0.0) @ v


def draw(queries=LENGTH, keys=LENGTH, heads=4, kv_heads=2, dtype=torch.float64, spread=1.0):
    q = torch.randn(2, heads, queries, 6, dtype=dtype).mul(spread).requires_grad_()
    k = torch.randn(2, kv_heads, keys, 6, dtype=dtype, requires_grad=True)
    v = torch.randn(2, kv_heads, keys, 5, dtype=dtype, requires_grad=True)
    return q, k, v


@pytest.mark.parametrize("block", [1, 4, 8, LENGTH, 64])
@pytest.mark.parametrize("case", MASKS)
def test_tiles_equal_the_whole_matrix(case, block):
    q, k, v = draw()
    mask = MASKS[case]
    out, expected = flash_attention(q, k, v, mask, block=block), naive(q, k, v, mask)
    assert (out - expected).abs().max() <= 1e-10
    grad = torch.randn_like(out)
    visible = (mask or Bidirectional()).dense(torch.arange(LENGTH), torch.arange(LENGTH))
    if visible.any(-1).all():  # the naive softmax has NaN gradients where a query sees nothing
        theirs = torch.autograd.grad(expected, (q, k, v), grad)
    else:
        theirs = by_rows(q, k, v, visible, grad)
    for ours, reference in zip(torch.autograd.grad(out, (q, k, v), grad), theirs, strict=True):
        assert (ours - reference).abs().max() <= 1e-10


def by_rows(q, k, v, visible, grad):
    """Gradients through the queries that see something only, each over what it sees."""
    visible = visible.expand(2, q.shape[2], k.shape[2])
    total = q.sum() * 0 + k.sum() * 0 + v.sum() * 0
    for r in range(2):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = visible[r, t].nonzero()[:, 0]
                if len(seen):
                    key, value = k[r, h // 2, seen], v[r, h // 2, seen]
                    weights = (key @ q[r, h, t] / q.shape[-1] ** 0.5).softmax(0)
                    total = total + (weights @ value) @ grad[r, h, t]
    return torch.autograd.grad(total, (q, k, v))


@pytest.mark.parametrize(("queries", "keys"), [(3, 17), (17, 3), (1, 1)])
def test_queries_and_keys_may_differ_in_number(queries, keys):
    q, k, v = draw(queries, keys)
    for mask in (None, Causal()):
        ours, theirs = flash_attention(q, k, v, mask, scale=0.3, block=4), naive(q, k, v, mask, 0.3)
        assert (ours - theirs).abs().max() <= 1e-10


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_query_heads_share_key_heads(heads, kv_heads):
    q, k, v = draw(heads=heads, kv_heads=kv_heads)
    out, expected = flash_attention(q, k, v, Causal(), block=8), naive(q, k, v, Causal())
    grad = torch.randn_like(out)
    assert (out - expected).abs().max() <= 1e-10
    pairs = zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True)
    assert all((ours - theirs).abs().max() <= 1e-10 for ours, theirs in pairs)


def test_scores_that_would_overflow_exp_do_not():
    q, k, v = draw(spread=1000.0)
    out = flash_attention(q, k, v, Causal(), block=4)
    assert (out - naive(q, k, v, Causal())).abs().max() <= 1e-10


def test_half_precision_keeps_its_sums_in_fp32():
    q, k, v = draw(dtype=torch.bfloat16)
    exact = naive(q.double(), k.double(), v.double(), Causal())
    out = flash_attention(q, k, v, Causal(), block=4)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= 2**-7  # half a step of bf16 at values of about 2


def peak_of(attention, length: int) -> int:
    """Bytes alive at most during forward and backward, above inputs (1 row, 1 head, D = 8, fp32)."""
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    with PeakBytes() as memory:
        attention(q, k, v).sum().backward()
    return memory.peak


def test_memory_grows_with_the_length_and_the_naive_form_with_its_square():
    short, long = 256, 1024
    tiled = [peak_of(lambda q, k, v: flash_attention(q, k, v, Causal(), block=32), n) for n in (short, long)]
    whole = [peak_of(lambda q, k, v: naive(q, k, v, Causal()), n) for n in (short, long)]
    assert tiled[1] < 4.2 * tiled[0]  # 4 times the length
    assert whole[1] > 15 * whole[0]
    assert tiled[1] < 0.02 * whole[1]


def test_peak_bytes_counts_what_is_alive():
    outside = torch.zeros(1000)
    with PeakBytes() as memory:
        a = torch.zeros(100)  # 400 bytes
        b = a + 1.0  # 800
        view = b[10:].view(9, 10)
        assert memory.now == 800
        a = None
        assert memory.now == 400
        outside.add_(1.0)
        c = torch.ones(200) * 2.0  # 400 + 800 for a moment + 800
        assert memory.now == 1200
        b = None
        assert memory.now == 1200  # the view keeps it
        view = None
        assert memory.now == 800
        del c
    assert (memory.now, memory.peak, a, b, view) == (0, 2000, None, None, None)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = draw()
    with pytest.raises(HanlinError, match="heads a multiple of kv_heads"):
        flash_attention(q[:, :3], k, v)
    with pytest.raises(HanlinError, match="expected q"):
        flash_attention(q, k, v[:, :, :-1])
    with pytest.raises(HanlinError, match="block is 0"):
        flash_attention(q, k, v, block=0)
