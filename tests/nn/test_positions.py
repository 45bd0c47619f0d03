"""Positions added to the token vectors, against the papers' formula and the modules of transformers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.xlm.modeling_xlm import create_sinusoidal_embeddings

from hanlin.core.errors import HanlinError
from hanlin.nn.positions import LearnedPositions, SinusoidalPositions, sinusoids


@given(st.integers(0, 5000), st.integers(1, 17), st.sampled_from(["interleaved", "halves"]))
@settings(max_examples=200, deadline=None)
def test_sinusoids_are_the_formula_of_the_paper(position, width, layout):
    out = sinusoids(torch.tensor([[position]]), width, layout=layout)
    sines = [math.sin(position / 10_000 ** (2 * i / width)) for i in range((width + 1) // 2)]
    cosines = [math.cos(position / 10_000 ** (2 * i / width)) for i in range(width // 2)]
    expected = [0.0] * width
    if layout == "halves":
        expected = sines + cosines
    else:
        expected[0::2], expected[1::2] = sines, cosines
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0, 0].double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-8)


@pytest.mark.parametrize("width", [2, 7, 12])
def test_the_tables_are_those_of_marian_and_xlm(width):
    positions = torch.arange(40)[None]
    marian = MarianSinusoidalPositionalEmbedding(40, width).create_weight()
    assert torch.equal(SinusoidalPositions(40, width, layout="halves")(positions)[0], marian)
    if width % 2 == 0:
        xlm = torch.empty(40, width)
        create_sinusoidal_embeddings(40, width, xlm)
        assert torch.equal(SinusoidalPositions(40, width)(positions)[0], xlm)


def test_a_sinusoidal_table_has_nothing_to_save_and_may_be_built_on_meta():
    with torch.device("meta"):
        module = SinusoidalPositions(8, 4)
    assert not module.state_dict()
    with torch.inference_mode():
        module(torch.arange(3)[None])
    x = torch.zeros(1, 3, 4, requires_grad=True)
    (x + module(torch.arange(3)[None])).square().sum().backward()
    assert torch.equal(x.grad, 2 * sinusoids(torch.arange(3)[None], 4))
    assert module(torch.tensor([[5, 5], [0, 7]])).shape == (2, 2, 4)


def test_learned_positions_are_those_of_bart():
    torch.manual_seed(0)
    ours, theirs = LearnedPositions(10, 6, offset=2), BartLearnedPositionalEmbedding(10, 6)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.zeros(3, 7)
    assert torch.equal(ours(torch.arange(7)[None]), theirs(ids)[:1])
    assert torch.equal(ours(torch.tensor([[3]])), theirs.weight[5][None, None])


def test_a_learned_row_is_the_position_and_its_offset():
    module = LearnedPositions(4, 3)
    assert torch.equal(module(torch.tensor([[3, 0]]))[0], module.weight[[3, 0]])
    padded = LearnedPositions(4, 3, offset=2)  # RoBERTa with padding_idx 1: padding is position -1
    assert padded.weight.shape == (6, 3)
    assert torch.equal(padded(torch.tensor([[-1, 0]]))[0], padded.weight[[1, 2]])
    padded(torch.tensor([[3]])).sum().backward()
    assert padded.weight.grad.sum(-1).tolist() == [0, 0, 0, 0, 0, 3]


@pytest.mark.parametrize(
    ("module", "position"),
    [
        (LearnedPositions(5, 2), 5),
        (LearnedPositions(5, 2), -1),
        (LearnedPositions(5, 2, offset=2), 5),
        (LearnedPositions(5, 2, offset=2), -3),
        (SinusoidalPositions(5, 2), 5),
        (SinusoidalPositions(5, 2), -1),
    ],
)
def test_a_position_outside_the_table_is_refused_by_number(module, position):
    with pytest.raises(HanlinError, match=f"Position {position} is outside .* … 4"):
        module(torch.tensor([[0, 1], [2, position]]))
    assert module(torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0, 2)


def test_wrong_arguments_are_refused():
    with pytest.raises(HanlinError, match="'spiral'"):
        SinusoidalPositions(5, 2, layout="spiral")
    with pytest.raises(HanlinError, match="-1 rows in"):
        LearnedPositions(5, 2, offset=-1)


def test_a_compiled_graph_gives_the_same():
    for module in (LearnedPositions(5, 2, offset=1), SinusoidalPositions(5, 2)):
        positions = torch.tensor([[0, 4]])
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(positions), module(positions))
