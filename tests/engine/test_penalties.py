"""Each penalty against transformers' or a twin of loops; histories that grow against histories made at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from hanlin.engine.penalties import (
    History,
    dry_penalties,
    forbid,
    index_words,
    ngram_bans,
    occurrence_penalties,
    penalise_repetition,
    prolong_runs,
    repeated_runs,
    word_bans,
)
from hanlin.engine.types import SamplingParams

ids = st.lists(st.integers(0, 3), min_size=1, max_size=30)
ALL = SamplingParams(repetition_penalty=1.2, presence_penalty=0.1, no_repeat_ngram=2, dry_multiplier=1.0)


def array(values) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    logits, ids = torch.randn(1, 50), torch.randint(0, 50, (1, 40))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    seen = ids.unique()
    logits[0, seen] = penalise_repetition(logits[0, seen], torch.full((len(seen),), penalty))
    torch.testing.assert_close(logits, theirs)


@given(ids, st.integers(1, 5))
def test_ngram_bans_equal_transformers(ids, n):
    theirs = NoRepeatNGramLogitsProcessor(n)(torch.tensor([ids]), torch.zeros(1, 4))
    assert ngram_bans(array(ids), n).tolist() == theirs[0].isinf().nonzero()[:, 0].tolist()


@given(
    ids,
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=6),
    st.integers(0, 3),
)
def test_word_bans_equal_transformers_wherever_the_guessed_tokens_begin(ids, words, guessed):
    theirs = NoBadWordsLogitsProcessor(words)(torch.tensor([ids]), torch.zeros(1, 4))
    cut = max(0, len(ids) - guessed)
    found = word_bans(ids[:cut], ids[cut:], index_words(words))
    assert found == theirs[0].isinf().nonzero()[:, 0].tolist()


def test_occurrence_penalties_are_their_formula():
    assert occurrence_penalties(array([0, 1, 5]), 0.5, 0.25).tolist() == [0.0, 0.75, 1.75]
    assert occurrence_penalties(array([0, 3]), -1.0, 0.0).tolist() == [0.0, -1.0]


def dry_by_hand(ids: list[int], p: SamplingParams) -> dict[int, float]:
    """The rule as it is told: for every place, compare backwards with the end, until they differ or a breaker comes."""
    longest: dict[int, int] = {}
    for place in range(len(ids) - 1):
        length = 0
        while (
            place - length >= 0
            and ids[place - length] == ids[len(ids) - 1 - length]
            and ids[place - length] not in p.dry_breakers
        ):
            length += 1
        following = ids[place + 1]
        if following not in p.dry_breakers and length >= p.dry_allowed_length:
            longest[following] = max(longest.get(following, 0), length)
    return {t: p.dry_multiplier * p.dry_base ** (n - p.dry_allowed_length) for t, n in longest.items()}


@settings(max_examples=200)
@given(ids, st.sets(st.integers(0, 3), max_size=2), st.integers(1, 4), st.sampled_from([1.0, 1.75, 3.0]))
def test_dry_equals_the_rule_told_in_loops(ids, breakers, allowed, base):
    p = SamplingParams(
        dry_multiplier=0.8, dry_base=base, dry_allowed_length=allowed, dry_breakers=tuple(sorted(breakers))
    )
    tokens, values = dry_penalties(array(ids), repeated_runs(ids, frozenset(breakers)), p)
    assert dict(zip(tokens.tolist(), values.tolist(), strict=True)) == pytest.approx(dry_by_hand(ids, p))


def test_dry_of_a_very_long_run_overflows_nothing():
    p = SamplingParams(dry_multiplier=1.0, dry_base=1.75)
    tokens, values = dry_penalties(array([7] * 5000), repeated_runs([7] * 5000), p)
    assert tokens.tolist() == [7]
    assert np.isfinite(values).all()
    assert values[0] > 1e20


@given(ids, st.sets(st.integers(0, 3), max_size=1))
def test_runs_that_grow_equal_runs_found_at_once(ids, breakers):
    runs = array([])
    for size in range(1, len(ids) + 1):
        runs = prolong_runs(runs, array(ids[:size]), frozenset(breakers))
        assert runs.tolist() == repeated_runs(ids[:size], frozenset(breakers)).tolist()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.lists(st.integers(1, 30), max_size=5), st.data())
def test_a_history_that_grows_equals_one_made_at_once_with_and_without_guesses(ids, cuts, data):
    prompt, guessed = data.draw(st.integers(0, len(ids))), data.draw(st.integers(0, len(ids)))
    grown = History(ALL, prompt)
    known = len(ids) - guessed
    for cut in sorted(cuts):
        if prompt <= cut < known:
            grown.follow(ids[:cut])
            grown.seen(ids[cut:])  # leaves nothing behind
    grown.follow(ids[:known])
    found = grown.seen(ids[known:])
    if known >= prompt:
        output = ids[prompt:]
        assert dict(zip(found.said.tolist(), found.times.tolist(), strict=True)) == {
            token: output.count(token) for token in set(output)
        }
    assert found.ids.tolist() == ids
    assert sorted(found.distinct.tolist()) == sorted(set(ids))
    assert found.runs.tolist() == repeated_runs(ids).tolist()


def test_a_history_keeps_only_what_is_asked_for():
    history = History(SamplingParams(frequency_penalty=1.0), 2)
    history.follow([5, 6, 7, 7])
    seen = history.seen([8, 7])
    assert (seen.ids.size, seen.distinct.size, seen.runs.size) == (0, 0, 0)
    assert (seen.said.tolist(), seen.times.tolist()) == ([7, 8], [3, 1])


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 100])
def test_masks_forbid_the_tokens_without_a_bit(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    may = torch.rand(3, vocabulary, generator=generator) < 0.5
    words = torch.zeros(3, -(-vocabulary // 32), dtype=torch.int64)
    for row in range(3):
        for token in may[row].nonzero()[:, 0].tolist():
            words[row, token // 32] |= 1 << (token % 32)
    allowed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    logits = torch.randn(3, vocabulary, generator=generator)
    assert torch.equal(forbid(logits, allowed), logits.masked_fill(~may, -torch.inf))
