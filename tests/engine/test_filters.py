"""Each filter against transformers' and a brute-force twin; draws against the distribution; rows alone and together."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hanlin.engine.filters import (
    BLOCK,
    apply_temperature,
    block_sums,
    draw,
    drop_below,
    drop_untypical,
    min_p_floor,
    top_k_floor,
    top_p_floor,
    uniform,
)

VOCABULARY = 500
NO_IDS = torch.zeros(6, 1, dtype=torch.int64)


def some_logits(rows: int = 6, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def column(*values: float, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


@pytest.mark.parametrize("k", [1, 2, 50, 499, 500, 900])
def test_top_k_keeps_what_transformers_keeps(k):
    logits = some_logits()
    ours = drop_below(logits, top_k_floor(logits.topk(min(k, VOCABULARY)).values, torch.full((6, 1), k)))
    assert kept(ours) == kept(TopKLogitsWarper(k)(NO_IDS, logits.clone()))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_top_p_keeps_what_transformers_keeps(p, scale):
    logits = some_logits(vocabulary=3000) * scale  # a flat one needs more than the first look
    ours = drop_below(logits, top_p_floor(logits, column(*[p] * 6)))
    assert kept(ours) == kept(TopPLogitsWarper(p)(NO_IDS, logits.double()))


@given(st.lists(st.integers(-40, 40), min_size=2, max_size=12), st.floats(0.01, 0.99))
def test_top_p_is_the_smallest_set_that_reaches_p(values, p):
    logits = torch.tensor([values], dtype=torch.float32) / 10
    found = kept(drop_below(logits, top_p_floor(logits, column(p))))[0]
    probability = torch.tensor(values, dtype=torch.float64).div(10).softmax(0)
    assert probability[list(found)].sum() >= p - 1e-6
    lowest = min(values[i] for i in found)
    without = [i for i in found if values[i] > lowest]  # tied tokens stay or go together
    assert probability[without].sum() < p + 1e-6
    assert found == {i for i, v in enumerate(values) if v >= lowest}


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(p):
    logits = some_logits()
    ours = drop_below(logits, min_p_floor(logits, column(*[p] * 6, dtype=torch.float32)))
    assert kept(ours) == kept(MinPLogitsWarper(p)(NO_IDS, logits.clone()))


@pytest.mark.parametrize("mass", [0.01, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_typical_sampling_keeps_what_transformers_keeps(mass, scale):
    logits = some_logits(vocabulary=3000) * scale
    ours = drop_untypical(logits, column(*[mass] * 6))
    theirs = TypicalLogitsWarper(mass)(NO_IDS, logits.double())
    for a, b in zip(kept(ours), kept(theirs), strict=True):
        assert len(a ^ b) <= (2 if scale < 0.1 else 0)  # flat: surprises differ in the last bits only


def test_typical_sampling_takes_no_notice_of_what_is_forbidden():
    logits = some_logits()
    forbidden = logits.masked_fill(torch.arange(VOCABULARY) % 2 == 0, -torch.inf)
    half = drop_untypical(logits[:, 1::2], column(*[0.5] * 6))
    assert kept(drop_untypical(forbidden, column(*[0.5] * 6))) == [{2 * i + 1 for i in row} for row in kept(half)]


def test_filters_that_are_off_in_a_row_drop_nothing_there():
    logits = some_logits(2)
    whole = set(range(VOCABULARY))
    assert kept(drop_below(logits, top_k_floor(logits.topk(5).values, torch.tensor([[5], [0]]))))[1] == whole
    assert kept(drop_below(logits, top_p_floor(logits, column(0.5, 1.0))))[1] == whole
    assert kept(drop_below(logits, min_p_floor(logits, column(0.5, 0.0, dtype=torch.float32))))[1] == whole
    assert kept(drop_untypical(logits, column(0.5, 1.0)))[1] == whole


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
def test_temperature_gives_the_distribution_of_transformers(temperature):
    logits = some_logits()
    theirs = TemperatureLogitsWarper(temperature)(NO_IDS, logits.clone())
    ours = apply_temperature(logits, torch.full((6, 1), temperature))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-42])
def test_a_tiny_temperature_is_greedy_and_overflows_nothing(temperature):
    logits = some_logits()
    tokens, finite = draw(apply_temperature(logits, torch.full((6, 1), temperature)), torch.full((6,), 0.5).double())
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert finite.all()


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_draw_is_where_the_cumulative_probability_passes_the_number(vocabulary):
    """A twin that adds up one token after the other."""
    logits, rng = some_logits(40, vocabulary=vocabulary), random.Random(0)
    numbers = [rng.random() for _ in range(40)]
    tokens, _ = draw(logits, torch.tensor(numbers, dtype=torch.float64))
    for token, number, row in zip(tokens.tolist(), numbers, logits.double().softmax(-1).tolist(), strict=True):
        before, after = sum(row[:token]), sum(row[: token + 1])
        assert before - 1e-6 <= number < after + 1e-6


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("vocabulary", [4, 2 * BLOCK + 3])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(number, vocabulary):
    logits = torch.full((1, vocabulary), -torch.inf)
    logits[0, 1], logits[0, vocabulary // 2] = 0.0, 1.0
    token, finite = draw(logits, torch.tensor([number], dtype=torch.float64))
    assert token.item() == (1 if number == 0 else vocabulary // 2)
    assert finite.all()


def test_impossible_tokens_are_never_drawn():
    """Few possible tokens among many, and numbers everywhere."""
    logits = torch.full((1000, 5 * BLOCK), -torch.inf)
    possible = torch.tensor([3, BLOCK - 1, BLOCK, 3 * BLOCK + 17, 4 * BLOCK + 5])
    logits[:, possible] = some_logits(1000, vocabulary=5)
    tokens, finite = draw(logits, torch.linspace(0, 1 - 2**-53, 1000, dtype=torch.float64))
    assert finite.all()
    assert set(tokens.tolist()) == set(possible.tolist())


def test_rounding_at_the_end_does_not_step_past_the_last_possible_token():
    logits = some_logits(300, vocabulary=4 * BLOCK)
    logits[:, : 3 * BLOCK] += 15  # the sum before the last block has no bits left for its end
    logits[:, -7:] = -torch.inf
    tokens, _ = draw(logits, torch.full((300,), 1 - 2**-53, dtype=torch.float64))
    assert (tokens < 4 * BLOCK - 7).all()
    assert (tokens >= 3 * BLOCK).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_are_reported(bad):
    logits = some_logits(3)
    logits[1, 7] = bad
    logits[2] = -torch.inf
    assert draw(logits, torch.full((3,), 0.5).double())[1].tolist() == [True, False, False]


def test_numbers_depend_on_seed_and_position_and_spread_evenly():
    numbers = torch.tensor([[uniform(seed, position) for position in range(100)] for seed in range(200)])
    assert numbers.unique().numel() > 19_900
    assert uniform(2**70, 5) == uniform(2**70, 5) != uniform(2**70 + 1, 5)
    counts = torch.histc(numbers, bins=50, min=0, max=1)
    assert ((counts - 400) ** 2 / 400).sum() < 85.4  # chi-square, 49 degrees of freedom, p = 0.001
    assert abs(torch.corrcoef(numbers[:, :2].T)[0, 1]) < 0.25  # 3.5 standard deviations


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.sampled_from([7, BLOCK, 5000]), st.integers(0, 4))
def test_every_row_is_the_same_alone_and_among_others_to_the_last_bit(rows, vocabulary, seed):
    logits = some_logits(rows, seed, vocabulary)
    p, number = torch.rand(rows, 1, dtype=torch.float64), torch.rand(rows, dtype=torch.float64)

    def chain(x, p, number):
        x = drop_below(x, top_p_floor(x, p.clamp_min(0.01)))
        return drop_untypical(x, p.clamp_min(0.01)), block_sums(x.exp()), draw(x, number)[0]

    together = chain(logits, p, number)
    for i in range(rows):
        alone = chain(logits[i : i + 1], p[i : i + 1], number[i : i + 1])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))
