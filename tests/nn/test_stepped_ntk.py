"""Qwen's dynamic NTK against its formula, a number at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.nn.rope import Rope
from hanlin.nn.rope_scaling import scaling_to_json
from hanlin.nn.stepped_ntk import SteppedNtk


def frequencies(length: int, trained: int, dim: int, theta: float) -> list[float]:
    """What one text of this length turns by, in fp64."""
    alpha, reached = 1, trained
    while reached < length:  # one more step for each doubling begun
        alpha, reached = 2 * alpha + 1, 2 * reached
    base = theta * alpha ** (dim / (dim - 2))
    return [base ** (-2 * i / dim) for i in range(dim // 2)]


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 200_000), trained=st.integers(2, 9_000), half=st.integers(2, 20), theta=st.floats(100.0, 1e6)
)
def test_each_length_has_the_base_of_its_step(length, trained, half, theta):
    dim = 2 * half
    expected = torch.tensor(frequencies(length, trained, dim, theta), dtype=torch.float64)
    scaling = SteppedNtk(trained)
    found, factor = scaling(dim, theta, length)
    assert factor == 1.0 and ((found.double() - expected) / expected).abs().max() <= 5e-6
    rows, _ = scaling(dim, theta, torch.tensor([[length], [1]]))
    assert torch.equal(rows[0], found) and torch.equal(rows[1], scaling(dim, theta, 1)[0])


@pytest.mark.parametrize("doublings", range(8))
def test_a_step_ends_exactly_at_a_doubling(doublings):
    scaling, end = SteppedNtk(24), 24 * 2**doublings
    last, after = scaling(8, 1e4, torch.tensor([[end], [end + 1]]))[0]
    assert torch.allclose(last[-1] * (2 ** (doublings + 1) - 1), torch.tensor(1e4**-0.75), rtol=1e-5)
    assert torch.allclose(after[-1] * (2 ** (doublings + 2) - 1), torch.tensor(1e4**-0.75), rtol=1e-5)
    assert math.isclose(float(scaling(8, 1e4, end)[0][-1]), float(last[-1]), rel_tol=1e-6)


def test_each_row_turns_by_its_own_length():
    rope = Rope(scaling=SteppedNtk(8))
    short, long = torch.arange(6)[None], torch.arange(6)[None] + 20
    both = rope.tables(torch.cat([short, long]), 8, torch.float64)
    for row, alone in enumerate((short, long)):
        for table, expected in zip(both, rope.tables(alone, 8, torch.float64), strict=True):
            assert torch.equal(table[row : row + 1], expected)


def test_files_that_cannot_say_it_refuse_it():
    with pytest.raises(HanlinError, match="SteppedNtk"):
        scaling_to_json(1e4, SteppedNtk(8))
    with pytest.raises(HanlinError, match="positive integer"):
        SteppedNtk(0)
