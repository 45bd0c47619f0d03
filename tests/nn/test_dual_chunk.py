"""Dual Chunk Attention against a loop over (query, key) that turns each pair by its relative position."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.nn.dual_chunk import DualChunk, dual_chunk_attention, log_n_scale

THETA, D = 50.0, 6
FREQUENCIES = [THETA ** (-2 * i / D) for i in range(D // 2)]


def turn(x, positions):
    """Rotary positions in fp64, half-split pairs: x (rows, T, heads, D), positions (1, T)."""
    angles = (positions.double()[..., None] * torch.tensor(FREQUENCIES, dtype=torch.float64))[:, :, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def score(q, k, distance: int) -> torch.Tensor:
    """q . R(-distance) k: sum over pairs, as complex numbers, of Re(q conj(k) e^(i distance f))."""
    total = 0.0
    for i, frequency in enumerate(FREQUENCIES):
        a, b = torch.complex(q[i], q[i + D // 2]), torch.complex(k[i], k[i + D // 2])
        e = complex(math.cos(distance * frequency), math.sin(distance * frequency))
        total = total + (a * b.conj() * e).real
    return total


def distance_by_cases(i: int, j: int, s: int, c: int, w: int) -> int:
    """The paper's equations 2 to 5, one pair at a time."""
    key = j % s
    if i // s == j // s:
        return i % s - key
    if i // s - j // s == 1:
        successive = [*range(s, s + w), *[c - 1] * (s - w)][:s]
        return successive[i % s] - key
    return c - 1 - key


def by_loops(q, k, v, distance):
    rows, T, heads, _ = q.shape
    L, groups = k.shape[1], heads // k.shape[2]
    out = []
    for r in range(rows):
        for t in range(T):
            i = L - T + t
            for h in range(heads):
                scores = torch.stack([score(q[r, t, h], k[r, j, h // groups], distance(i, j)) for j in range(i + 1)])
                out.append((scores / D**0.5).softmax(0) @ v[r, : i + 1, h // groups])
    return torch.stack(out).view(rows, T, heads, -1)


def draw(queries: int, keys: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, queries, 4, D, generator=g, dtype=torch.float64)
    k = torch.randn(2, keys, 2, D, generator=g, dtype=torch.float64)
    v = torch.randn(2, keys, 2, 5, generator=g, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize(
    ("length", "s", "c", "w"),
    [
        (13, 4, 6, 2),
        (13, 4, 6, None),
        (13, 4, 6, 0),
        (16, 4, 8, None),
        (9, 1, 3, None),
        (11, 5, 20, 3),
        (7, 3, 4, 1),
    ],
)
def test_chunks_equal_every_pair_turned_alone(length, s, c, w):
    q, k, v = draw(length, length)
    out = dual_chunk_attention(q, k, v, DualChunk(s, c, w), turn)
    near = min(s, c - s if w is None else w)
    expected = by_loops(q, k, v, lambda i, j: distance_by_cases(i, j, s, c, near))
    assert (out - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("length", [1, 7, 8])
def test_one_chunk_is_plain_rotary_attention(length):
    q, k, v = draw(length, length)
    out = dual_chunk_attention(q, k, v, DualChunk(8, 12), turn)
    assert (out - by_loops(q, k, v, lambda i, j: i - j)).abs().max() <= 1e-10


def test_what_is_near_keeps_its_true_distance_across_the_border():
    pattern = DualChunk(chunk=6, trained=10)
    q, k = torch.arange(6, 10), torch.arange(2, 6)  # the start of a chunk and the end of the one before
    assert torch.equal(pattern.queries(q, 1)[:, None] - pattern.keys(k), q[:, None] - k)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 12).flatmap(lambda c: st.tuples(st.integers(1, c - 1), st.just(c))), st.integers(1, 60))
def test_no_relative_position_leaves_the_trained_range(sizes, length):
    pattern = DualChunk(*sizes)
    index = torch.arange(length)
    for i in range(length):
        for back in (0, 1, 2):
            keys = index[: i + 1]
            gap = i // pattern.chunk - keys // pattern.chunk
            keys = keys[gap >= 2] if back == 2 else keys[gap == back]
            distance = pattern.queries(index[i], back) - pattern.keys(keys)
            assert ((distance >= 0) & (distance < pattern.trained)).all()


@pytest.mark.parametrize("new", [1, 3, 5, 9])
def test_the_last_queries_alone_equal_the_whole(new):
    q, k, v = draw(14, 14)
    whole = dual_chunk_attention(q, k, v, DualChunk(4, 6), turn)
    last = dual_chunk_attention(q[:, -new:], k, v, DualChunk(4, 6), turn)
    assert (last - whole[:, -new:]).abs().max() <= 1e-12


def test_gradients_flow_to_all_three():
    q, k, v = (x.requires_grad_() for x in draw(5, 5))
    assert torch.autograd.gradcheck(lambda q, k, v: dual_chunk_attention(q, k, v, DualChunk(2, 4), turn), (q, k, v))


def test_log_n_scale_is_the_logarithm_to_the_base_of_the_trained_length():
    positions = torch.arange(100).view(2, 50)
    expected = [[math.log(p + 1, 16) if p + 1 > 16 else 1.0 for p in row] for row in positions.tolist()]
    scale = log_n_scale(positions, 16)
    assert scale.dtype == torch.float32
    assert torch.allclose(scale, torch.tensor(expected), rtol=0, atol=1e-6)
    assert scale[1, -1] > 1.6
    assert (scale.flatten()[:16] == 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualChunk(8, 8), "chunk is 8, expected 1 … 7"),
        (lambda: DualChunk(0, 8), "chunk is 0"),
        (lambda: DualChunk(4, 8, 5), "near is 5, expected 0 … 4"),
        (lambda: log_n_scale(torch.arange(3), 1), "trained is 1"),
        (lambda: dual_chunk_attention(*draw(5, 4), DualChunk(2, 4), turn), "5 queries of 4 heads and 4 keys"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(HanlinError, match=message):
        make()
