"""BART's five noises, each against what it says, and their composition."""

from collections import Counter
from math import exp, factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.data.corruption.boundaries import SentenceTable, spellings
from hanlin.data.corruption.denoising import (
    Noise,
    delete_some,
    draw_span_lengths,
    infill,
    mask_some,
    permute_sentences,
    rotate,
)

MASK = -1


def is_subsequence(part, whole) -> bool:
    rest = iter(whole)
    return all(token in rest for token in part)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 99))
def test_masking_and_deleting_take_their_share_and_leave_the_rest(length, rate, seed):
    ids = np.arange(length)
    masked = mask_some(ids, np.random.default_rng(seed), rate=rate, mask_id=MASK)
    assert (masked == MASK).sum() == round(rate * length) and (masked[masked != MASK] == ids[masked != MASK]).all()
    left = delete_some(ids, np.random.default_rng(seed), rate=rate)
    assert len(left) == length - min(round(rate * length), max(length - 1, 0))
    assert (np.diff(left) > 0).all(), "what is left keeps its order and stands once"


def test_every_place_is_deleted_equally_often():
    chance = np.random.default_rng(0)
    kept = Counter(t for _ in range(3000) for t in delete_some(np.arange(10), chance, rate=0.3).tolist())
    assert all(abs(n - 2100) < 4.5 * np.sqrt(3000 * 0.21) for n in kept.values()) and len(kept) == 10


def test_span_lengths_are_poisson_of_3():
    """Chi-square of 60,000 lengths against Poisson(3): below the 1-in-100,000 quantile for 9 degrees of freedom."""
    lengths = Counter(draw_span_lengths(200_000, np.random.default_rng(0)).tolist())
    total = lengths.total()
    expected = {k: total * exp(-3) * 3**k / factorial(k) for k in range(9)}
    expected[9] = total - sum(expected.values())
    found = {k: lengths[k] for k in range(9)} | {9: sum(n for k, n in lengths.items() if k >= 9)}
    assert total > 60_000
    assert sum((found[k] - expected[k]) ** 2 / expected[k] for k in expected) < 40.0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(0, 999), st.floats(0.5, 6))
def test_spans_take_exactly_what_is_asked_and_never_make_a_text_longer(tokens, seed, mean):
    lengths = draw_span_lengths(tokens, np.random.default_rng(seed), mean=mean)
    assert lengths.sum() == tokens and len(lengths) <= tokens


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.floats(0, 1), st.integers(0, 999))
def test_infilling_puts_one_mask_for_each_span(length, rate, seed):
    ids, chance = np.arange(length), np.random.default_rng(seed)
    lengths = draw_span_lengths(round(rate * length), chance)
    spoiled = infill(ids, lengths, chance, mask_id=MASK)
    kept = spoiled[spoiled != MASK]
    assert (spoiled == MASK).sum() == len(lengths) and len(spoiled) <= length
    assert len(kept) == length - lengths.sum() and (np.diff(kept) > 0).all()
    # brute force: read the result from left to right; the gaps in the text must be runs of masks that hold all of it
    gaps, at, masks = [], 0, 0
    for token in [*spoiled.tolist(), length]:
        if token == MASK:
            masks += 1
            continue
        gaps.append((token - at, masks))
        at, masks = token + 1, 0
    assert all(masks > 0 for missing, masks in gaps if missing)
    assert sum(missing for missing, _ in gaps) == lengths.sum()


def test_where_spans_stand_is_uniform():
    """3 tokens kept, one span of 2 and one of 0: C(5, 2) = 10 interleavings, equally often."""
    chance = np.random.default_rng(0)
    seen = Counter(tuple(infill(np.arange(5), [2, 0], chance, mask_id=MASK).tolist()) for _ in range(5000))
    assert len(seen) == 10 and all(abs(n - 500) < 4.5 * np.sqrt(450) for n in seen.values())


def test_sentences_are_permuted_and_none_is_broken():
    sentences = [np.array([1, 2]), np.array([3]), np.array([4, 5, 6])]
    chance = np.random.default_rng(0)
    seen = Counter(tuple(permute_sentences(sentences, chance).tolist()) for _ in range(1200))
    assert len(seen) == 6 and all(abs(n - 200) < 60 for n in seen.values())
    assert all("1, 2" in str(order) and "4, 5, 6" in str(order) for order in seen)


def test_rotation_begins_anywhere():
    chance = np.random.default_rng(0)
    seen = Counter(tuple(rotate(np.arange(4), chance).tolist()) for _ in range(1000))
    assert set(seen) == {(0, 1, 2, 3), (1, 2, 3, 0), (2, 3, 0, 1), (3, 0, 1, 2)}
    assert all(abs(n - 250) < 65 for n in seen.values())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=8),
    st.builds(Noise, *[st.floats(0, 1), st.floats(0.5, 5), st.floats(0, 1), st.floats(0, 1)], st.floats(0, 1)),
    st.integers(0, 99),
)
def test_any_composition_is_no_longer_than_the_text_and_invents_nothing(lengths, noise, seed):
    ids = np.arange(sum(lengths))
    sentences = np.split(ids, np.cumsum(lengths)[:-1])
    spoiled = noise.apply(sentences, np.random.default_rng(seed), mask_id=MASK)
    again = noise.apply(sentences, np.random.default_rng(seed), mask_id=MASK)
    assert (spoiled == again).all() if len(spoiled) == len(again) else False
    kept = spoiled[spoiled != MASK]
    assert len(spoiled) <= len(ids) and len(set(kept.tolist())) == len(kept) and np.isin(kept, ids).all()


def test_without_noise_the_document_is_itself():
    nothing = Noise(infill=0.0, permute=0.0)
    assert (
        nothing.apply([np.arange(3), np.arange(3, 5)], np.random.default_rng(0), mask_id=MASK) == np.arange(5)
    ).all()


def test_chinese_and_english_sentences_change_places_whole(tokenizer):
    table = SentenceTable(spellings(tokenizer))
    sentences = ["the model reads.", " 翰林读书。", "语言模型写字！", " writes text?"]
    ids = np.array(tokenizer.encode("".join(sentences)))
    noise = Noise(infill=0.0)
    spoiled = noise.apply(table.split(ids), np.random.default_rng(3), mask_id=MASK)
    text = tokenizer.decode(spoiled.tolist())
    assert text != "".join(sentences) and sorted(text) == sorted("".join(sentences))
    assert all(sentence.strip() in text for sentence in sentences)


def test_what_cannot_be_meant_is_refused():
    chance = np.random.default_rng(0)
    with pytest.raises(HanlinError, match=r"rate of 1\.2"):
        delete_some(np.arange(4), chance, rate=1.2)
    with pytest.raises(HanlinError, match=r"mean span of 0\.1"):
        draw_span_lengths(5, chance, mean=0.1)
    with pytest.raises(HanlinError, match="Spans of 6 tokens in a text of 5"):
        infill(np.arange(5), [3, 3], chance, mask_id=MASK)
    with pytest.raises(HanlinError, match=r"Noise\.delete is 2"):
        Noise(delete=2)
    with pytest.raises(HanlinError, match=r"Noise\.span is 0"):
        Noise(span=0)
