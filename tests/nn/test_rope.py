"""Rotation in every layout against complex numbers, against loops, and against the models of transformers."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, GlmConfig, LlamaConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

from hanlin.core.errors import HanlinError
from hanlin.nn.rope import Rope, block_rope_tables, inverse_frequencies, rope_tables, rotate
from hanlin.nn.rope_scaling import DynamicNtk, Linear, LongRope, Yarn

FP64 = torch.float64
PAIRS = {"half-split": lambda i, dim: (i, i + dim // 2), "interleaved": lambda i, dim: (2 * i, 2 * i + 1)}


def turned_by_loops(x: torch.Tensor, positions: torch.Tensor, dim: int, pairs, theta: float) -> torch.Tensor:
    """Each pair of the first `dim` dimensions as a complex number times e^(i angle)."""
    out = x.clone()
    inverse = inverse_frequencies(dim, theta)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            for i in range(dim // 2):
                a, b = pairs(i, dim)
                turn = cmath.exp(1j * int(positions[row % len(positions), t]) * float(inverse[i]))
                for head in range(x.shape[2]):
                    z = complex(float(x[row, t, head, a]), float(x[row, t, head, b])) * turn
                    out[row, t, head, a], out[row, t, head, b] = z.real, z.imag
    return out


@given(
    layout=st.sampled_from(sorted(PAIRS)),
    half=st.integers(1, 5),
    rest=st.sampled_from([0, 0, 1, 2, 6]),
    rows=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_every_layout_turns_the_pairs_it_names_and_no_other(layout, half, rest, rows, seed):
    torch.manual_seed(seed)
    x, positions = torch.randn(2, 3, 2, 2 * half + rest, dtype=FP64), torch.randint(0, 60, (rows, 3))
    rope = Rope(theta=100.0, dim=2 * half if rest else None, interleaved=layout == "interleaved")
    out = rotate(x, *rope.tables(positions, 2 * half + rest, FP64))
    expected = turned_by_loops(x, positions, 2 * half, PAIRS[layout], 100.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_two_axes_turn_each_half_of_a_head_by_its_own_positions():
    torch.manual_seed(0)
    x, positions = torch.randn(2, 5, 3, 8, dtype=FP64), torch.randint(0, 40, (2, 2, 5))
    out = rotate(x, *block_rope_tables(positions, 8, 100.0, FP64))
    halves = zip(x.chunk(2, -1), positions, strict=True)
    parts = [turned_by_loops(part, axis, 4, PAIRS["half-split"], 100.0) for part, axis in halves]
    torch.testing.assert_close(out, torch.cat(parts, -1), rtol=0, atol=1e-12)


TABLES = {
    "half-split": lambda p: Rope(theta=50.0).tables(p, 8, FP64),
    "half-split, partial": lambda p: Rope(theta=50.0, dim=4).tables(p, 8, FP64),
    "interleaved": lambda p: Rope(theta=50.0, interleaved=True).tables(p, 8, FP64),
    "interleaved, partial": lambda p: Rope(theta=50.0, dim=6, interleaved=True).tables(p, 8, FP64),
    "two axes": lambda p: block_rope_tables(torch.stack([p, p + 3]), 8, 50.0, FP64),
    "with a factor": lambda p: Rope(theta=50.0, scaling=Yarn(factor=4.0, trained=64)).tables(p, 8, FP64),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_backward_pass_is_the_derivative(name):
    torch.manual_seed(1)
    tables = TABLES[name](torch.arange(3)[None])
    assert torch.autograd.gradcheck(
        lambda x: rotate(x, *tables), (torch.randn(2, 3, 2, 8, dtype=FP64, requires_grad=True),)
    )
    strided = torch.randn(2, 2, 3, 8, dtype=FP64, requires_grad=True)  # heads first, as a view
    assert torch.autograd.gradcheck(lambda x: rotate(x.transpose(1, 2), *tables), (strided,))


@pytest.mark.parametrize("name", TABLES)
def test_recording_gradients_changes_no_bit(name):
    x, tables = torch.randn(2, 3, 2, 8, dtype=FP64), TABLES[name](torch.arange(3)[None])
    with torch.no_grad():
        expected = rotate(x, *tables)
    assert torch.equal(rotate(x, *tables), expected)
    assert expected.shape == x.shape


@given(
    q=st.integers(0, 200),
    k=st.integers(0, 200),
    shift=st.integers(0, 500),
    interleaved=st.booleans(),
    dim=st.sampled_from([None, 4, 12]),
    scaling=st.sampled_from([None, Linear(4.0), Yarn(factor=4.0, trained=64)]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_scores_depend_on_the_relative_position_only(q, k, shift, interleaved, dim, scaling, seed):
    torch.manual_seed(seed)
    rope = Rope(theta=1000.0, dim=dim, interleaved=interleaved, scaling=scaling)
    query, key = torch.nn.functional.normalize(torch.randn(2, 1, 1, 1, 16, dtype=FP64), dim=-1)

    def score(q, k):
        at = [rope.tables(torch.tensor([[place]]), 16, FP64, longest=64) for place in (q, k)]
        return float((rotate(query, *at[0]) * rotate(key, *at[1])).sum())

    assert math.isclose(score(q, k), score(q + shift, k + shift), abs_tol=1e-10)
    if q != k and dim is None and scaling is None:
        assert abs(score(q, k) - score(k, k)) > 1e-9  # and on that it does depend


def single_precision(tables):
    """Tables of an fp32 model, whose angles have the bits of transformers', for a comparison of the turn in fp64."""
    return [table.double() for table in tables]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tables_have_the_bits_of_llama(dtype):
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    positions = torch.randint(0, 8000, (3, 77))
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions)
    ours = Rope(theta=5e5).tables(positions, 12, dtype)
    assert torch.equal(ours[0][:, :, 0], cos)
    assert torch.equal(ours[1][:, :, 0].abs(), sin.abs())
    q, k = torch.randn(2, 3, 77, 2, 12, dtype=dtype)
    expected = modeling_llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for x, turned in zip((q, k), expected, strict=True):
        torch.testing.assert_close(
            rotate(x, *ours).transpose(1, 2), turned, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.05
        )


def test_glm_turns_the_first_half_in_interleaved_pairs():
    config = GlmConfig(
        hidden_size=32, num_attention_heads=2, head_dim=16, partial_rotary_factor=0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    positions, (q, k) = torch.randint(0, 500, (2, 9)), torch.randn(2, 2, 9, 2, 16, dtype=FP64)
    cos, sin = single_precision(modeling_glm.GlmRotaryEmbedding(config)(q.float(), positions))
    expected = modeling_glm.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    tables = single_precision(Rope(dim=8, interleaved=True).tables(positions, 16, torch.float32))
    for x, turned in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(x, *tables).transpose(1, 2), turned, rtol=0, atol=1e-14)


def test_deepseek_scores_are_equal_with_yarn_and_its_temperatures():
    parameters = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32,
        "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 4, "beta_slow": 1,
    }  # fmt: skip
    config = DeepseekV3Config(max_position_embeddings=256, qk_rope_head_dim=16, rope_parameters=dict(parameters))
    positions, (q, k) = torch.arange(20)[None] * 9, torch.randn(2, 1, 20, 2, 16, dtype=FP64)
    cos, sin = single_precision(modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)(q.float(), positions))
    heads_first = (q.transpose(1, 2), k.transpose(1, 2))
    their_q, their_k = modeling_deepseek_v3.apply_rotary_pos_emb_interleave(*heads_first, cos, sin)
    yarn = Yarn(factor=8.0, trained=32, mscale=0.7, mscale_all_dim=1.3, beta_fast=4, beta_slow=1)
    tables = single_precision(Rope(interleaved=True, scaling=yarn).tables(positions, 16, torch.float32, longest=256))
    ours = torch.einsum("rthd,rshd->rhts", rotate(q, *tables), rotate(k, *tables))
    torch.testing.assert_close(ours, their_q @ their_k.transpose(-1, -2), rtol=0, atol=1e-12)
    assert math.isclose(yarn.score_scale, modeling_deepseek_v3.yarn_apply_mscale(parameters, 1.0), rel_tol=1e-14)
    assert Yarn(factor=8.0).score_scale == 1.0


@pytest.mark.parametrize("scaling", [DynamicNtk(3.0), LongRope((1.0,) * 6, (2.0, 3.0) * 3, trained=32)], ids=repr)
def test_each_row_is_scaled_for_its_own_length(scaling):
    rope = Rope(scaling=scaling)
    positions = torch.stack([torch.arange(8), torch.arange(70, 78), torch.arange(20, 28)])
    together = rope.tables(positions, 12, FP64, longest=32)
    for row in range(3):
        alone = rope.tables(positions[row : row + 1], 12, FP64, longest=32)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[row], b[0])
    short = Rope().tables(positions[:1], 12, FP64)
    factor = rope.frequencies(12, longest=32)[1]
    torch.testing.assert_close(together[0][0], short[0][0] * factor, rtol=1e-6, atol=0)
    fixed = rope.tables(positions[:1], 12, FP64, longest=32, length=78)  # what the sequence may grow to
    inverse, factor = rope.frequencies(12, 78, longest=32)
    assert torch.equal(fixed[0], rope_tables(positions[:1], inverse, FP64, factor=factor)[0])
    assert not torch.equal(fixed[0], together[0][:1])


def test_tables_made_in_inference_mode_serve_training_later():
    rope, positions = Rope(theta=77.0), torch.arange(4)[None]
    with torch.inference_mode():
        rope.tables(positions, 8, FP64)
    x = torch.randn(1, 4, 1, 8, dtype=FP64, requires_grad=True)
    rotate(x, *rope.tables(positions, 8, FP64)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    "rope", [Rope(theta=33.0), Rope(dim=4, interleaved=True), Rope(scaling=DynamicNtk(2.0))], ids=repr
)
def test_a_compiled_graph_has_no_break_and_gives_the_same(rope):
    def turn(x, positions):
        return rotate(x, *rope.tables(positions, 8, x.dtype, longest=4))

    x, positions = torch.randn(2, 6, 2, 8, dtype=FP64), torch.arange(6)[None]
    compiled = torch.compile(turn, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, positions), turn(x, positions), rtol=0, atol=1e-12)


def test_equal_ropes_are_one_key():
    pair = [Rope(scaling=LongRope((1.0, 2.0), (3.0, 4.0), trained=8)) for _ in range(2)]
    assert len(set(pair)) == 1
    assert Rope() != Rope(interleaved=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rope(theta=0.0), "base is 0.0"),
        (lambda: Rope(theta=math.nan), "base is nan"),
        (lambda: Rope(dim=3), "positive even number"),
        (lambda: Rope(dim=16).frequencies(8), "16 dimensions of a head of 8"),
        (lambda: Rope().frequencies(7), "7 dimensions of a head of 7"),
        (lambda: Rope(scaling=DynamicNtk(2.0)).frequencies(8), "'max_position_embeddings'"),
        (lambda: block_rope_tables(torch.zeros(1, 5, dtype=torch.int64), 8, 1e4, FP64), "two axes"),
        (lambda: block_rope_tables(torch.zeros(2, 1, 5, dtype=torch.int64), 6, 1e4, FP64), "multiple of 4"),
    ],
)
def test_what_cannot_turn_is_refused(make, words):
    with pytest.raises(HanlinError, match=words):
        make()
