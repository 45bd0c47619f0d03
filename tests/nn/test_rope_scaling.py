"""Every context extension against transformers' `ROPE_INIT_FUNCTIONS` or its closed form, and the JSON both ways."""

import json
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hanlin.core.errors import HanlinError
from hanlin.nn.rope import Rope, inverse_frequencies
from hanlin.nn.rope_scaling import (
    SCALINGS,
    BaseConversion,
    DynamicNtk,
    Linear,
    Llama3,
    LongRope,
    NtkAware,
    Proportional,
    RopeScaling,
    Yarn,
    scaling_from_json,
    scaling_to_json,
)

FACTOR = st.floats(1.0, 40.0)
TRAINED = st.integers(8, 9000)


@pytest.fixture(autouse=True, scope="module")
def without_the_remarks_of_transformers():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def maybe(values):
    return st.none() | values


@st.composite
def tables(draw, kind: str, half: int):
    """`rope_parameters` of one kind for heads of 2 * half dimensions, as a file may hold them."""
    table = {"rope_type": kind, "rope_theta": draw(st.floats(50.0, 1e7))}
    divisors = st.lists(st.floats(0.9, 60.0), min_size=half, max_size=half)
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        table["factor"] = draw(FACTOR)
    if kind in ("yarn", "llama3", "longrope"):
        table["original_max_position_embeddings"] = draw(TRAINED)
    if kind == "yarn":
        table |= {key: draw(maybe(st.floats(0.1, 2.0))) for key in ("mscale", "mscale_all_dim", "attention_factor")}
        table |= {"beta_fast": draw(maybe(st.floats(8, 64))), "beta_slow": draw(maybe(st.floats(0.2, 8)))}
        table["truncate"] = draw(st.booleans())
        table["factor"] = draw(maybe(FACTOR))
    if kind == "llama3":
        table["low_freq_factor"] = draw(st.floats(0.5, 2.0))
        table["high_freq_factor"] = draw(st.floats(2.1, 8.0))
    if kind == "longrope":
        table |= {"short_factor": draw(divisors), "long_factor": draw(divisors)}
        table |= {"factor": draw(maybe(FACTOR)), "attention_factor": draw(maybe(st.floats(0.5, 2.0)))}
    if kind == "proportional":
        table |= {"partial_rotary_factor": draw(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0])), "factor": draw(FACTOR)}
    return table


def reference(table: dict, head_dim: int, longest: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=longest,
        rope_parameters=json.loads(json.dumps(table)),
    )  # fmt: skip


@pytest.mark.parametrize("kind", sorted(ROPE_INIT_FUNCTIONS))
def test_each_scaling_has_the_bits_of_transformers(kind):
    @given(st.data(), st.integers(2, 40), st.integers(8, 20_000), st.none() | st.integers(1, 60_000))
    @settings(max_examples=200, deadline=None)
    def check(data, half, longest, length):
        table = data.draw(tables(kind, half))
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](reference(table, 2 * half, longest), seq_len=length)
        theta, scaling, partial = scaling_from_json(table, "config.json")
        assert isinstance(scaling, SCALINGS[kind])
        assert partial is None
        ours, our_factor = Rope(theta=theta, scaling=scaling).frequencies(2 * half, length, longest=longest)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, inverse)
        assert math.isclose(our_factor, factor, rel_tol=1e-15)
        again = scaling_from_json(scaling_to_json(theta, scaling), "again")
        assert again == (theta, scaling, None)

    check()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("length", [20, 64, 65, 200])
def test_a_forward_pass_of_any_length_has_the_frequencies_of_transformers(kind, length):
    table = {"rope_type": kind, "rope_theta": 1e4, "factor": 3.7}
    if kind == "longrope":
        table |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 3.0, 9.0, 30.0]}
        table["original_max_position_embeddings"] = 64
    module = LlamaRotaryEmbedding(reference(table, 8, 64))
    positions = torch.arange(length)[None]
    cos, _ = module(torch.zeros(1), positions)
    theta, scaling, _ = scaling_from_json(table, "config.json")
    ours, _ = Rope(theta=theta, scaling=scaling).tables(positions, 8, torch.float32, longest=64)
    torch.testing.assert_close(ours[:, :, 0], cos, rtol=0, atol=1e-9)


def test_the_table_names_every_function_of_transformers():
    assert set(ROPE_INIT_FUNCTIONS) | {"default", "ntk", "base"} == set(SCALINGS)


@given(st.integers(2, 64), st.floats(100.0, 1e6), FACTOR)
@settings(max_examples=200, deadline=None)
def test_ntk_aware_squeezes_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all(half, theta, factor):
    dim = 2 * half
    ours, temperature = NtkAware(factor)(dim, theta)
    base = theta * factor ** (dim / (dim - 2))
    expected = [base ** (-2 * i / dim) for i in range(half)]
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)
    plain = inverse_frequencies(dim, theta)
    assert ours[0] == plain[0]
    assert math.isclose(ours[-1] * factor, plain[-1], rel_tol=2e-6)
    assert temperature == 1.0


@given(st.integers(1, 64), st.floats(100.0, 1e6), st.floats(100.0, 1e6))
@settings(max_examples=200, deadline=None)
def test_base_conversion_is_the_other_base(half, theta, base):
    ours, temperature = BaseConversion(base)(2 * half, theta)
    expected = [base ** (-i / half) for i in range(half)]
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)
    assert temperature == 1.0


def test_direct_is_the_plain_rope():
    assert torch.equal(RopeScaling()(16, 500.0)[0], inverse_frequencies(16, 500.0))
    assert Rope(scaling=RopeScaling()).frequencies(16)[1] == 1.0


def test_yarn_keeps_the_fast_pairs_and_squeezes_the_slow_ones():
    ours, temperature = Yarn(factor=16.0, trained=4096)(128, 1e4)
    plain = inverse_frequencies(128, 1e4)
    turns = 4096 * plain / (2 * math.pi)
    torch.testing.assert_close(ours[turns > 33], plain[turns > 33])
    torch.testing.assert_close(ours[turns < 0.9], plain[turns < 0.9] / 16)
    assert math.isclose(temperature, 0.1 * math.log(16) + 1)


def test_old_and_new_spellings_mean_the_same():
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert scaling_from_json(new, "f") == (1e4, Linear(2.0), None)
    assert scaling_from_json({"type": "linear", "factor": 2}, "f") == (None, Linear(2), None)
    assert scaling_from_json(new | {"type": "linear"}, "f") == (1e4, Linear(2.0), None)
    assert scaling_from_json({}, "f") == (None, None, None)
    assert scaling_from_json({"rope_type": "default", "rope_theta": 7.0}, "f") == (7.0, None, None)
    assert scaling_from_json({"rope_type": "default", "partial_rotary_factor": 0.5}, "f") == (None, None, 0.5)


def test_phi_3_keeps_its_trained_length_beside_the_table():
    table = {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
    _, scaling, _ = scaling_from_json(table, "f", trained=16)
    assert scaling == LongRope((1.0, 1.5), (2.0, 4.0), trained=16)
    assert scaling(4, 100.0, None, 64)[1] == math.sqrt(1 + math.log(4) / math.log(16))


def test_what_transformers_has_no_name_for_is_written_as_its_base():
    assert scaling_to_json(1e4, BaseConversion(5e5)) == {"rope_type": "default", "rope_theta": 5e5}
    table = scaling_to_json(1e4, NtkAware(4.0), dim=16)
    assert torch.equal(inverse_frequencies(16, table["rope_theta"]), NtkAware(4.0)(16, 1e4)[0])
    assert table["rope_type"] == "default"
    with pytest.raises(HanlinError, match="give `dim`"):
        scaling_to_json(1e4, NtkAware(4.0))
    assert scaling_to_json(1e4, None, fraction=0.5)["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"rope_type": "spiral"}, "'spiral' is unknown"),
        ({"rope_type": "linear"}, "needs 'factor'"),
        ({"rope_type": "linear", "factor": None}, "needs 'factor'"),
        ({"rope_type": "linear", "factor": "2"}, "\"factor\" is '2'; it must be a positive number"),
        ({"rope_type": "linear", "factor": True}, '"factor" is True'),
        ({"rope_type": "linear", "factor": 0}, '"factor" is 0'),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "'beta_fast' would not act"),
        ({"mrope_section": [1, 2]}, "'mrope_section' would not act"),
        ({"rope_type": "linear", "type": "dynamic", "factor": 2.0}, "\"rope_type\" is 'linear' and \"type\" 'dynamic'"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "true or false"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}, "beta_fast is 1"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2.5}, "a positive integer"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 1}, "must be larger"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [0.0]}, "a list of positive numbers"),
        ({"rope_theta": -1.0}, '"rope_theta" is -1.0'),
        ({"partial_rotary_factor": 1.5}, '"partial_rotary_factor" is 1.5'),
        ({"rope_type": "proportional", "partial_rotary_factor": 1.5}, '"partial_rotary_factor" is 1.5'),
    ],
    ids=str,
)
def test_what_would_not_act_is_refused_with_its_place(table, words):
    with pytest.raises(HanlinError, match=words) as caught:
        scaling_from_json(table, 'm/config.json: "rope_scaling"')
    assert str(caught.value).startswith('m/config.json: "rope_scaling": ')


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: NtkAware(2.0)(2, 1e4), "more than one pair"),
        (lambda: Yarn(factor=2.0)(8, 1e4), "original_max_position_embeddings"),
        (lambda: Yarn(trained=8)(8, 1e4), "'factor'"),
        (lambda: Yarn(factor=2.0, trained=8)(8, 1.0), "above 1"),
        (lambda: Yarn(mscale_all_dim=1.0).score_scale, "'factor'"),
        (lambda: DynamicNtk(2.0)(8, 1e4, 5), "max_position_embeddings"),
        (lambda: LongRope((1.0,), (1.0,), trained=8)(8, 1e4), "has 1 numbers; 8 dimensions turn, so it must have 4"),
        (lambda: LongRope((1.0,) * 4, (1.0,) * 4)(8, 1e4), "original_max_position_embeddings"),
        (lambda: Llama3(2.0, 1.0, 4.0)(8, 1e4), "original_max_position_embeddings"),
        (lambda: Proportional(fraction=-0.1), "from 0 to 1"),
    ],
)
def test_what_is_missing_is_named(call, words):
    with pytest.raises(HanlinError, match=words):
        call()
