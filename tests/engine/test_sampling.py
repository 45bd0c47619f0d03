"""The sampler against transformers' chains and closed forms; draws by chi-square; guessed tokens; batch mates."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hanlin.core.errors import HanlinError
from hanlin.engine.sampling import BROKEN, Choice, Place, Row, Sampler, check_tokens, prompt_logprobs
from hanlin.engine.types import EVERY, SamplingParams

VOCABULARY = 300
DRAWS = 20_000
SAMPLER = Sampler(VOCABULARY)


def some_logits(rows: int = 6, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def masks(may: torch.Tensor) -> torch.Tensor:
    """(M, V) bool -> the bits of the interface."""
    bits = torch.nn.functional.pad(may.long(), (0, -may.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (bits << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def best(logits: torch.Tensor, row: Row, allowed: torch.Tensor | None = None, drafted: tuple[int, ...] = ()) -> int:
    return SAMPLER.choose(logits, [Place(row, drafted)], allowed)[0].token


IDS = [1, 2, 3, 1, 2, 7, 7, 250, 1, 2]


def chain_of(p: SamplingParams) -> LogitsProcessorList:
    """transformers' processors in the order that we state."""
    chain = LogitsProcessorList()
    if p.logit_bias:
        chain.append(SequenceBiasLogitsProcessor([[[token], value] for token, value in p.logit_bias]))
    if p.min_tokens:
        chain.append(MinNewTokensLengthLogitsProcessor(4, p.min_tokens, 9))
    if p.bad_words:
        chain.append(NoBadWordsLogitsProcessor([list(word) for word in p.bad_words]))
    if p.no_repeat_ngram:
        chain.append(NoRepeatNGramLogitsProcessor(p.no_repeat_ngram))
    if p.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    warpers = [
        *([TopKLogitsWarper(p.top_k)] if p.top_k else []),
        *([TopPLogitsWarper(p.top_p)] if p.top_p < 1 else []),
        *([MinPLogitsWarper(p.min_p)] if p.min_p else []),
        *([TypicalLogitsWarper(p.typical_p)] if p.typical_p < 1 else []),
    ]
    temperature = [TemperatureLogitsWarper(p.temperature)] if p.temperature not in (0.0, 1.0) else []
    chain += [*warpers, *temperature] if p.filters_first else [*temperature, *warpers]
    return chain


MIXES = {
    "nothing": SamplingParams(),
    "tempered": SamplingParams(temperature=0.6),
    "k, p": SamplingParams(temperature=1.4, top_k=40, top_p=0.8),
    "k, p, temperature last": SamplingParams(temperature=2.5, top_k=40, top_p=0.8, filters_first=True),
    "min-p": SamplingParams(temperature=1.5, min_p=0.05),
    "min-p, temperature last": SamplingParams(temperature=1.5, min_p=0.05, filters_first=True),
    "typical": SamplingParams(temperature=1.3, typical_p=0.6),
    "typical, temperature last": SamplingParams(temperature=0.5, typical_p=0.6, filters_first=True),
    "bias, bans, penalties": SamplingParams(
        temperature=1.2,
        logit_bias=((3, 2.5), (40, -1.0)),
        bad_words=((5,), (1, 2, 6), (2, 7)),
        no_repeat_ngram=3,
        repetition_penalty=1.4,
        min_tokens=20,
    ),
    "all": SamplingParams(
        temperature=1.7,
        top_k=60,
        top_p=0.95,
        min_p=0.01,
        typical_p=0.9,
        repetition_penalty=0.8,
        no_repeat_ngram=2,
        logit_bias=((7, 3.0),),
        bad_words=((2, 3),),
    ),
}


@pytest.mark.parametrize("params", MIXES.values(), ids=MIXES)
def test_draws_follow_the_chain_of_transformers(params):
    """Every draw is another row's, all at the same place; frequencies against the probabilities of the chain."""
    logits = some_logits(1, seed=2)
    expected = chain_of(params)(torch.tensor([IDS]), logits.clone()).softmax(-1)[0]
    tokens = torch.cat(
        [
            torch.tensor([c.token for c in SAMPLER.choose(logits.expand(2000, -1), places)])
            for places in (
                [Place(Row(params, IDS, 4, [9], seed)) for seed in range(start, start + 2000)]
                for start in range(0, DRAWS, 2000)
            )
        ]
    )
    counts = tokens.bincount(minlength=VOCABULARY)
    assert (expected[counts > 0] > 0).all()
    assert chi_square(counts, expected, DRAWS) < 1.0


@pytest.mark.parametrize("params", MIXES.values(), ids=MIXES)
def test_log_probs_are_the_processed_scores_of_transformers_beam_search(params):
    logits = some_logits(3)
    rows = [Row(params, [*IDS, i], 4, [9], 0) for i in range(3)]
    theirs = chain_of(params)(torch.tensor([row.ids for row in rows]), logits.log_softmax(-1))
    ours = SAMPLER.log_probs(logits, [Place(row) for row in rows])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_ties_with_the_last_of_the_top_k_can_be_drawn():
    logits = torch.full((400, VOCABULARY), -torch.inf)
    logits[:, 10], logits[:, 20:24] = 1.0, 0.0
    logits[200:, 10] = -torch.inf  # fewer and fewer possible ones
    logits[300:, 21:24] = -torch.inf
    rows = [Row(SamplingParams(top_k=2, temperature=5.0), IDS, 4, seed=seed) for seed in range(400)]
    tokens = [choice.token for choice in SAMPLER.choose(logits, [Place(row) for row in rows])]
    assert [set(tokens[:200]), set(tokens[200:300]), set(tokens[300:])] == [
        {10, 20, 21, 22, 23},
        {20, 21, 22, 23},
        {20},
    ]


def test_log_probs_of_greedy_parameters_are_untempered_and_unfiltered():
    logits, params = some_logits(1), SamplingParams(temperature=0, top_k=3, top_p=0.5)
    torch.testing.assert_close(SAMPLER.log_probs(logits, [Place(Row(params, IDS, 4))]), logits.log_softmax(-1))


def test_log_probs_for_contrastive_search_are_normalised_and_keep_all_candidates():
    logits, params = some_logits(1), SamplingParams(contrast=0.5, top_k=4, repetition_penalty=1.3)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([IDS]), logits.clone()).log_softmax(-1)
    torch.testing.assert_close(SAMPLER.log_probs(logits, [Place(Row(params, IDS, 4))]), theirs)


def test_log_probs_know_what_is_forbidden():
    logits, may = some_logits(2), torch.rand(2, VOCABULARY, generator=torch.Generator().manual_seed(0)) < 0.5
    found = SAMPLER.log_probs(logits, [Place(Row(SamplingParams(), IDS, 4))] * 2, masks(may))
    torch.testing.assert_close(found, logits.log_softmax(-1).masked_fill(~may, -torch.inf))


def test_presence_frequency_and_dry_are_their_formulas_on_the_logits():
    logits = some_logits(1)
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=0.25, dry_multiplier=0.8, dry_base=1.5, dry_allowed_length=1
    )
    row = Row(params, [5, 6, 8, 9, 5, 6, 8, 6], 4)  # "6" stood before 8 twice, behind other tokens
    expected = logits.log_softmax(-1)
    for token, times in ((5, 1), (6, 2), (8, 1)):
        expected[0, token] -= 0.5 + 0.25 * times
    expected[0, 8] -= 0.8
    torch.testing.assert_close(SAMPLER.log_probs(logits, [Place(row)]), expected)


options = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 5, 400]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    typical_p=st.sampled_from([1.0, 1.0, 0.5]),
    filters_first=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    no_repeat_ngram=st.sampled_from([0, 2]),
    dry_multiplier=st.sampled_from([0.0, 0.8]),
    dry_breakers=st.sampled_from([(), (2,)]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (3, 1.0), (290, -5.0))]),
    bad_words=st.sampled_from([(), ((4,), (2, 3))]),
    min_tokens=st.sampled_from([0, 9, 11]),
    logprobs=st.sampled_from([None, 0, 2, EVERY]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(options, min_size=2, max_size=5), st.booleans())
def test_a_place_gets_the_same_alone_and_among_others_to_the_last_bit(params, bound):
    count, generator = len(params), torch.Generator().manual_seed(len(params))
    vocabulary = 5000  # more than one block, and more than the first look of top-p
    logits = some_logits(count, vocabulary=vocabulary) / 4
    may = (torch.rand(count, vocabulary, generator=generator) < 0.5) | (torch.arange(count)[:, None] % 2 == 0)
    allowed = masks(may) if bound else None
    if allowed is not None:
        allowed[::2] = -1

    def rows() -> list[Row]:
        return [Row(p, [*IDS, i], 4, [9], seed=i) for i, p in enumerate(params)]

    together, apart, sampler = rows(), rows(), Sampler(vocabulary)
    before = logits.clone()
    for step in range(3):
        found = sampler.choose(logits, [Place(row) for row in together], allowed)
        single: list[Choice] = []
        for i, row in enumerate(apart):
            mask = None if allowed is None else allowed[i : i + 1]
            single += sampler.choose(logits[i : i + 1], [Place(row)], mask)
        assert found == single
        assert [choice.logprob is None for choice in found] == [p.logprobs is None for p in params]
        assert torch.equal(logits, before)
        whole = sampler.log_probs(logits, [Place(row) for row in together], allowed)
        alone = [
            sampler.log_probs(logits[i : i + 1], [Place(row)], None if allowed is None else allowed[i : i + 1])
            for i, row in enumerate(apart)
        ]
        assert torch.equal(whole, torch.cat(alone))
        for row, other, choice in zip(together, apart, found, strict=True):
            row.ids.append(choice.token)
            other.ids.append(choice.token)
        logits = before = logits.roll(7 + step, -1)


@settings(max_examples=60, deadline=None)
@given(options, st.lists(st.sampled_from([1, 2, 3, 7, 9, 250]), max_size=4))
def test_places_behind_guessed_tokens_equal_the_places_of_a_row_that_has_them(params, guessed):
    """All places of a row in one step, as speculation asks, and then again as if nobody had guessed."""
    drafted = tuple(guessed)
    logits = some_logits(len(drafted) + 1)
    row, plain = Row(params, list(IDS), 4, [9], 5), Row(params, list(IDS), 4, [9], 5)
    found = SAMPLER.choose(logits, [Place(row, drafted[:n]) for n in range(len(drafted) + 1)])
    for n in range(len(drafted) + 1):
        assert found[n] == SAMPLER.choose(logits[n : n + 1], [Place(plain)])[0]
        plain.ids.extend(drafted[n : n + 1])
    assert SAMPLER.choose(logits[:1], [Place(row)])[0] == found[0]  # the guesses left nothing behind


def test_a_row_that_was_made_anew_draws_the_same():
    """As after a preemption, or in another process."""
    logits, params = some_logits(8), SamplingParams(temperature=1.5, repetition_penalty=1.2, dry_multiplier=0.8)
    row = Row(params, list(IDS), 4, [9], 123)
    for step in range(8):
        token = best(logits[step : step + 1], row)
        assert token == best(logits[step : step + 1], Row(params, list(row.ids), 4, [9], 123))
        row.ids.append(token)


def test_penalties_count_what_was_just_drawn():
    logits = torch.zeros(1, 5)
    logits[0, 2], logits[0, 3] = 1.0, 0.9
    row, found = Row(SamplingParams(temperature=0, repetition_penalty=2.0), [], 0), []
    for _ in range(3):
        row.ids.append(best(logits, row))
        found.append(row.ids[-1])
    assert found == [2, 3, 2]  # 1, then 0.5 < 0.9, then both are halved


def test_logprobs_are_the_models_own():
    logits = some_logits(2)
    params = [SamplingParams(temperature=0.3, top_k=2, logprobs=3), SamplingParams(temperature=0, logprobs=0)]
    choices = SAMPLER.choose(logits, [Place(Row(p, [0], 1)) for p in params])
    whole = logits.log_softmax(-1)
    reports = [choice.logprob for choice in choices]
    for i, (choice, report) in enumerate(zip(choices, reports, strict=True)):
        assert report.token_id == choice.token
        assert report.logprob == pytest.approx(whole[i, choice.token].item(), abs=1e-6)
    first = whole[0].topk(3)
    assert [t for t, _ in reports[0].top] == first.indices.tolist()
    assert [p for _, p in reports[0].top] == pytest.approx(first.values.tolist(), abs=1e-6)
    assert reports[1].top == ()


def test_every_logprob_of_the_vocabulary_can_be_asked_for():
    report = SAMPLER.choose(some_logits(1), [Place(Row(SamplingParams(logprobs=EVERY), [0], 1))])[0].logprob
    assert sorted(token for token, _ in report.top) == list(range(VOCABULARY))
    assert sum(math.exp(logprob) for _, logprob in report.top) == pytest.approx(1, abs=1e-5)
    assert [p for _, p in report.top] == sorted((p for _, p in report.top), reverse=True)


@pytest.mark.parametrize("params", MIXES.values(), ids=MIXES)
def test_kept_and_drawn_describe_the_distribution_that_was_drawn_from(params):
    logits = some_logits(1, seed=5)
    asked = dataclasses.replace(params, logprobs=0)
    choice = SAMPLER.choose(logits, [Place(Row(asked, IDS, 4, [9], 11))])[0]
    final = chain_of(params)(torch.tensor([IDS]), logits.clone())[0]
    bare = dataclasses.replace(params, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0)
    tempered = chain_of(bare)(torch.tensor([IDS]), logits.clone()).softmax(-1)[0]
    assert choice.logprob.drawn == pytest.approx(final.log_softmax(-1)[choice.token].item(), abs=1e-5)
    assert choice.logprob.kept == pytest.approx(tempered[final.isfinite()].sum().item(), abs=1e-5)
    if params.filters_first is False and params.temperature == 1 and not params.bad_words:
        assert choice.logprob.drawn == pytest.approx(choice.logprob.logprob - math.log(choice.logprob.kept), abs=1e-5)


def test_a_greedy_choice_is_certain():
    params = SamplingParams(temperature=0, top_k=3, repetition_penalty=1.1, logprobs=0)
    report = SAMPLER.choose(some_logits(1), [Place(Row(params, IDS, 4))])[0].logprob
    assert (report.kept, report.drawn) == (1.0, 0.0)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(temperature=1.0)])
def test_constrained_places_choose_what_is_allowed(params):
    logits, may = some_logits(64), torch.zeros(64, VOCABULARY, dtype=torch.bool)
    may[:, [31, 32, 299]] = True
    allowed = masks(may)
    allowed[::2] = -1
    tokens = [c.token for c in SAMPLER.choose(logits, [Place(Row(params, IDS, 4, seed=i)) for i in range(64)], allowed)]
    free = [c.token for c in SAMPLER.choose(logits, [Place(Row(params, IDS, 4, seed=i)) for i in range(64)])]
    assert set(tokens[1::2]) == {31, 32, 299}
    assert tokens[::2] == free[::2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_is_allowed_the_token_is_broken(temperature):
    logits, p = some_logits(3), SamplingParams(temperature=temperature, logprobs=1)
    may = torch.ones(3, VOCABULARY, dtype=torch.bool)
    may[1] = False
    choices = SAMPLER.choose(logits, [Place(Row(p, [0], 1)) for _ in range(3)], masks(may))
    assert [choice.token == BROKEN for choice in choices] == [False, True, False]
    assert [choice.logprob is None for choice in choices] == [False, True, False]
    every = tuple((token,) for token in range(VOCABULARY))
    assert best(logits[:1], Row(dataclasses.replace(p, bad_words=every), [0], 1)) == BROKEN


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_noticed_and_hurt_only_their_place(temperature, penalty, bad):
    logits = some_logits(3)
    logits[1, 7] = bad
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, top_p=0.9)
    choices = SAMPLER.choose(logits, [Place(Row(params, [0], 1)) for _ in range(3)])
    assert [choice.token == BROKEN for choice in choices] == [False, True, False]


def test_end_tokens_wait_for_min_tokens():
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    row, sampler = Row(SamplingParams(temperature=0, min_tokens=2), [9], 1, ends=[0]), Sampler(3)
    for expected in (1, 1, 0):
        token = sampler.choose(logits, [Place(row)])[0].token
        assert token == expected
        row.ids.append(token)
    assert logits[0, 0] == 5.0  # the model's own logits are untouched


def test_prompt_tokens_that_the_model_never_says_are_passed_over():
    params = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.5)
    assert best(some_logits(1), Row(params, [VOCABULARY + 5, 3, VOCABULARY], 1)) >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_width_give_the_same_greedy_token(dtype):
    logits = some_logits(4).to(dtype)
    rows = [Row(SamplingParams(temperature=0), IDS, 4) for _ in range(4)]
    assert [c.token for c in SAMPLER.choose(logits, [Place(row) for row in rows])] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("count", [0, 3, EVERY])
def test_prompt_logprobs_are_those_of_each_token_behind_its_row(count):
    logits, ids = some_logits(150), torch.randint(0, VOCABULARY, (150,), generator=torch.Generator().manual_seed(1))
    found = prompt_logprobs(logits, ids, count)
    expected = logits.log_softmax(-1)
    assert [report.token_id for report in found] == ids.tolist()
    assert [report.logprob for report in found] == pytest.approx(expected[range(150), ids].tolist(), abs=1e-5)
    width = VOCABULARY if count == EVERY else count
    assert [[t for t, _ in report.top] for report in found] == expected.topk(width).indices.tolist()
    assert prompt_logprobs(logits, ids.tolist(), count) == found


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"typical_p": 0},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"stop": "text"},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"no_repeat_ngram": -1},
        {"dry_multiplier": -1},
        {"dry_base": 0.5},
        {"dry_allowed_length": 0},
        {"bad_words": ((),)},
        {"n": 0},
        {"logprobs": -2},
        {"min_tokens": 300},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(HanlinError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"logit_bias": ((VOCABULARY, 1.0),)},
        {"logit_bias": ((3, float("-inf")),)},
        {"bad_words": ((1, 2), (3, -1))},
        {"stop_token_ids": (VOCABULARY,)},
        {"dry_breakers": (-2,)},
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused_by_name(wrong):
    with pytest.raises(HanlinError, match=next(iter(wrong))):
        check_tokens(SamplingParams(**wrong), VOCABULARY)
    check_tokens(MIXES["all"], VOCABULARY)


def chi_square(counts: torch.Tensor, probability: torch.Tensor, total: int) -> float:
    """Pearson's statistic over its 99.9 % quantile (Wilson-Hilferty); cells that expect fewer than 5 are joined."""
    expected = probability.double() * total
    small = expected < 5
    pairs = list(zip(counts[~small].tolist(), expected[~small].tolist(), strict=True))
    if expected[small].sum() > 0:
        pairs.append((counts[small].sum().item(), expected[small].sum().item()))
    statistic, free = sum((c - e) ** 2 / max(e, 1e-9) for c, e in pairs), max(1, len(pairs) - 1)
    quantile = free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3
    return statistic / quantile
