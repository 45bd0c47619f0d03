"""Each filter against transformers' processor and a brute-force twin; draws against the distribution; batch mates."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hanlin.core.errors import HanlinError
from hanlin.engine.sampling import (
    BROKEN,
    Row,
    Sampler,
    apply_temperature,
    draw,
    drop_below,
    min_p_floor,
    penalise_repetition,
    top_k_floor,
    top_p_floor,
)
from hanlin.engine.types import SamplingParams

VOCABULARY = 500


def some_logits(rows: int = 6, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def column(*values: float, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


@pytest.mark.parametrize("k", [1, 2, 50, 499, 500, 900])
def test_top_k_keeps_what_transformers_keeps(k):
    logits = some_logits()
    ours = drop_below(logits, top_k_floor(logits.topk(min(k, VOCABULARY)).values, torch.full((6, 1), k)))
    assert kept(ours) == kept(TopKLogitsWarper(k)(torch.zeros(6, 1), logits.clone()))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_top_p_keeps_what_transformers_keeps(p, scale):
    logits = some_logits(vocabulary=3000) * scale  # a flat one needs more than the first look
    ours = drop_below(logits, top_p_floor(logits, torch.full((6, 1), p, dtype=torch.float64)))
    theirs = TopPLogitsWarper(p)(torch.zeros(6, 1), logits.clone().double())
    assert kept(ours) == kept(theirs)


@given(st.lists(st.integers(-40, 40), min_size=2, max_size=12), st.floats(0.01, 0.99))
def test_top_p_is_the_smallest_set_that_reaches_p(values, p):
    logits = torch.tensor([values], dtype=torch.float32) / 10
    found = kept(drop_below(logits, top_p_floor(logits, column(p, dtype=torch.float64))))[0]
    probability = torch.tensor(values, dtype=torch.float64).div(10).softmax(0)
    assert probability[list(found)].sum() >= p - 1e-6
    lowest = min(values[i] for i in found)
    without = [i for i in found if values[i] > lowest]  # tied tokens stay or go together
    assert probability[without].sum() < p + 1e-6
    assert found == {i for i, v in enumerate(values) if v >= lowest}


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(p):
    logits = some_logits()
    ours = drop_below(logits, min_p_floor(logits, torch.full((6, 1), p)))
    assert kept(ours) == kept(MinPLogitsWarper(p)(torch.zeros(6, 1), logits.clone()))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    logits, ids = some_logits(), torch.randint(0, VOCABULARY, (6, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(6, VOCABULARY, dtype=torch.bool).scatter_(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    torch.testing.assert_close(penalise_repetition(logits, seen, torch.full((6, 1), penalty)), theirs)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
def test_temperature_gives_the_distribution_of_transformers(temperature):
    logits = some_logits()
    theirs = TemperatureLogitsWarper(temperature)(torch.zeros(6, 1), logits.clone())
    ours = apply_temperature(logits, torch.full((6, 1), temperature))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-42])
def test_a_tiny_temperature_is_greedy_and_overflows_nothing(temperature):
    logits = some_logits()
    tokens, finite = draw(apply_temperature(logits, torch.full((6, 1), temperature)), torch.full((6,), 0.5).double())
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert finite.all()


def test_the_filters_work_in_the_documented_order():
    """All at once equal transformers' chain in that order, over many draws of the same logits."""
    logits, ids = some_logits(1), list(range(40, 80))
    params = SamplingParams(temperature=1.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.4, seed=0)
    chain = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([ids]), logits.clone())
    for warper in (TemperatureLogitsWarper(1.7), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)):
        chain = warper(torch.tensor([ids]), chain)
    expected = chain.softmax(-1)[0]
    rng = random.Random(1)
    drawn = torch.tensor([one(Row(params, list(ids), len(ids), generator=rng), logits) for _ in range(4000)])
    counts = drawn.bincount(minlength=VOCABULARY)
    assert set(drawn.tolist()) <= kept(chain)[0]
    assert chi_square(counts, expected, 4000) < 1.0


def test_draws_follow_the_distribution():
    logits = some_logits(1, seed=3, vocabulary=30)
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, _ = draw(logits.expand(20_000, -1), uniform)
    assert chi_square(tokens.bincount(minlength=30), logits.softmax(-1)[0], 20_000) < 1.0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    token, finite = draw(logits, torch.tensor([uniform], dtype=torch.float64))
    assert token.item() == (1 if uniform == 0 else 2)
    assert finite.all()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.8, 2.0]),
            top_k=st.sampled_from([0, 5, 300]),
            top_p=st.sampled_from([0.5, 0.9, 1.0]),
            min_p=st.sampled_from([0.0, 0.1]),
            repetition_penalty=st.sampled_from([1.0, 1.3]),
            seed=st.integers(0, 3),
            logprobs=st.sampled_from([None, 2]),
        ),
        min_size=2,
        max_size=5,
    )
)
def test_a_row_draws_the_same_alone_and_among_others(params):
    logits = some_logits(len(params))

    def rows():
        return [Row(p, [1, 2, 3, 400], 4, generator=random.Random(p.seed)) for p in params]

    together, alone = Sampler(rows(), VOCABULARY), [Sampler([row], VOCABULARY) for row in rows()]
    for _ in range(3):
        tokens, logprobs = together.choose(logits)
        single = [sampler.choose(logits[i : i + 1]) for i, sampler in enumerate(alone)]
        assert tokens == [t[0] for t, _ in single]
        assert [lp is None for lp in logprobs] == [p.logprobs is None for p in params]
        logits = logits.roll(7, -1)


def test_the_penalty_counts_what_was_just_drawn():
    logits = torch.zeros(1, 5)
    logits[0, 2] = 1.0
    logits[0, 3] = 0.9
    row = Row(SamplingParams(temperature=0, repetition_penalty=2.0), [], 0)
    sampler = Sampler([row], 5)
    assert [sampler.choose(logits)[0][0] for _ in range(3)] == [2, 3, 2]  # 1, then 0.5 < 0.9, then both are halved


def test_logprobs_are_the_models_own():
    logits = some_logits(2)
    params = [SamplingParams(temperature=0.3, top_k=2, logprobs=3, seed=1), SamplingParams(temperature=0, logprobs=0)]
    tokens, logprobs = Sampler([Row(p, [0], 1) for p in params], VOCABULARY).choose(logits)
    whole = logits.log_softmax(-1)
    for i, (token, report) in enumerate(zip(tokens, logprobs, strict=True)):
        assert report is not None
        assert report.token_id == token
        assert report.logprob == pytest.approx(whole[i, token].item(), abs=1e-6)
    best = whole[0].topk(3)
    assert [t for t, _ in logprobs[0].top] == best.indices.tolist()
    assert [p for _, p in logprobs[0].top] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert logprobs[1].top == ()


def test_end_tokens_wait_for_min_tokens():
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    row = Row(SamplingParams(temperature=0, min_tokens=2), [9], 1, ends=[0])
    sampler = Sampler([row], 3)
    for expected in (1, 1, 0):
        token = sampler.choose(logits)[0][0]
        assert token == expected
        row.ids.append(token)
    assert logits[0, 0] == 5.0  # the model's own logits are untouched


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_noticed_and_hurt_only_their_row(temperature, bad):
    logits = some_logits(3)
    logits[1, 7] = bad
    params = SamplingParams(temperature=temperature, seed=0)
    tokens, _ = Sampler([Row(params, [0], 1) for _ in range(3)], VOCABULARY).choose(logits)
    assert [t == BROKEN for t in tokens] == [False, True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"stop": "text"},
        {"repetition_penalty": 0},
        {"n": 0},
        {"logprobs": 21},
        {"min_tokens": 300},
        {"temperature": float("nan")},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(HanlinError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def one(row: Row, logits: torch.Tensor) -> int:
    return Sampler([row], logits.shape[-1]).choose(logits)[0][0]


def chi_square(counts: torch.Tensor, probability: torch.Tensor, total: int) -> float:
    """Pearson's statistic over its 99.9 % quantile (Wilson-Hilferty); cells that expect fewer than 5 are joined."""
    expected = probability.double() * total
    small = expected < 5
    pairs = list(zip(counts[~small].tolist(), expected[~small].tolist(), strict=True))
    if expected[small].sum() > 0:
        pairs.append((counts[small].sum().item(), expected[small].sum().item()))
    statistic, free = sum((c - e) ** 2 / max(e, 1e-9) for c, e in pairs), len(pairs) - 1
    quantile = free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3
    return statistic / quantile
