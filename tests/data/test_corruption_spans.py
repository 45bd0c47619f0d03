"""Span corruption, prefixes and sentence pairs: nothing is lost, lengths are what they are said to be."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.data.corruption.prefix_lm import draw_prefix, prefix_targets
from hanlin.data.corruption.sentence_pairs import ELSEWHERE, FOLLOWS, draw_pair, join_pair
from hanlin.data.corruption.span_corruption import (
    corrupt_spans,
    corrupted_lengths,
    count_noise,
    draw_spans,
    longest_text,
)
from hanlin.nn.losses import IGNORE

SENTINELS = list(range(999, 899, -1))


def restored(source, target) -> list[int]:
    """The text, by reading source and target as a person would."""
    spans: dict[int, list[int]] = {}
    for token in target.tolist():
        if token in SENTINELS:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    text: list[int] = []
    for token in source.tolist():
        text += spans[token] if token in SENTINELS else [token]
    return text


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 120), st.floats(0.01, 0.99), st.floats(1, 8), st.integers(0, 99), st.booleans())
def test_source_and_target_together_are_the_text(length, density, mean, seed, closing):
    ids = np.arange(length)
    spans = draw_spans(length, np.random.default_rng(seed), density=density, mean=mean)
    source, target = corrupt_spans(ids, spans, SENTINELS, closing=closing)
    assert restored(source, target) == ids.tolist()
    assert (len(source), len(target)) == corrupted_lengths(length, density=density, mean=mean, closing=closing)
    noise, count = count_noise(length, density=density, mean=mean)
    assert len(spans) == count and sum(stop - start for start, stop in spans) == noise
    assert 1 <= noise <= length - 1 and abs(noise - density * length) <= 1
    assert all(stop > start for start, stop in spans)
    assert all(b[0] > a[1] for a, b in pairwise(spans)), "no two sentinels stand together"
    used = [token for token in source.tolist() if token in SENTINELS]
    assert used == SENTINELS[: len(spans)] == [t for t in target.tolist() if t in SENTINELS][: len(spans)]
    assert (target[-1] == SENTINELS[len(spans)]) == closing


def test_density_and_span_length_are_t5s():
    """512 tokens: 77 of them in 26 spans, which is 15 % and 3 on average."""
    assert count_noise(512) == (77, 26)
    lengths = Counter(
        stop - start for seed in range(300) for start, stop in draw_spans(512, np.random.default_rng(seed))
    )
    assert sum(length * n for length, n in lengths.items()) / lengths.total() == pytest.approx(77 / 26)
    # a random composition: P(length l) = C(N - l - 1, k - 2) / C(N - 1, k - 1), which falls from l = 1 on
    assert lengths[1] / lengths.total() == pytest.approx(25 / 76, abs=0.02)


def test_every_choice_of_spans_is_equally_likely():
    """6 tokens, 2 of them noise in 2 spans: all C(5, 2) = 10 placements, by brute force."""
    chance = np.random.default_rng(0)
    seen = Counter(tuple(draw_spans(6, chance, density=1 / 3, mean=1.0)) for _ in range(5000))
    every = {((a, a + 1), (b, b + 1)) for a in range(6) for b in range(a + 2, 6)}
    assert set(seen) == every and len(every) == 10
    assert all(abs(n - 500) < 4.5 * np.sqrt(5000 * 0.1 * 0.9) for n in seen.values())


def test_the_sentence_of_the_paper():
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    source, target = corrupt_spans(np.arange(10), [(2, 4), (8, 9)], [100, 101, 102])
    names = dict(enumerate(words)) | {100: "<X>", 101: "<Y>", 102: "<Z>"}
    assert " ".join(names[t] for t in source.tolist()) == "Thank you <X> me to your party <Y> week"
    assert " ".join(names[t] for t in target.tolist()) == "<X> for inviting <Y> last <Z>"


def test_t5s_lengths():
    """512 of source, the end token among them, hold a text of 568; the released targets were 114 with theirs."""
    assert longest_text(511) == 568
    assert corrupted_lengths(568, closing=False) == (511, 113)
    for source in range(2, 200):
        length = longest_text(source)
        assert corrupted_lengths(length)[0] <= source < corrupted_lengths(length + 1)[0]


def test_chinese_and_english_survive_span_corruption(tokenizer):
    text = "the model reads 翰林读书 and writes 语言模型 text 写字 numbers 123"
    ids = np.array(tokenizer.encode(text))
    source, target = corrupt_spans(ids, draw_spans(len(ids), np.random.default_rng(1), density=0.5), SENTINELS)
    assert tokenizer.decode(restored(source, target)) == text


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 50), st.integers(0, 99))
def test_behind_the_prefix_every_token_is_predicted_once(length, seed):
    ids = np.arange(length) + 7
    prefix = draw_prefix(length, np.random.default_rng(seed))
    targets = prefix_targets(ids, prefix)
    assert 1 <= prefix < length
    for place in range(length):
        predicted = place + 1 < length and place + 1 >= prefix
        assert targets[place] == (ids[place + 1] if predicted else IGNORE)
    assert (targets != IGNORE).sum() == length - prefix


def test_every_prefix_is_equally_likely():
    chance = np.random.default_rng(0)
    seen = Counter(draw_prefix(5, chance) for _ in range(4000))
    assert sorted(seen) == [1, 2, 3, 4] and all(abs(n - 1000) < 130 for n in seen.values())


def test_pairs_are_cut_between_sentences_and_half_of_them_are_false():
    sentences = [np.arange(0, 3), np.arange(3, 4), np.arange(4, 9)]
    chance = np.random.default_rng(0)
    labels = Counter()
    for _ in range(2000):
        pair = draw_pair(sentences, lambda _, n: np.full(n, 77), chance)
        labels[pair.label] += 1
        assert len(pair.first) in (3, 4) and (pair.first == np.arange(len(pair.first))).all()
        rest = np.arange(len(pair.first), 9)
        assert (pair.second == (rest if pair.label == FOLLOWS else np.full(len(rest), 77))).all()
    assert abs(labels[ELSEWHERE] - 1000) < 4.5 * np.sqrt(500)


def test_a_text_of_one_sentence_is_cut_anywhere():
    chance = np.random.default_rng(0)
    cuts = {len(draw_pair([np.arange(4)], lambda _, n: np.zeros(n), chance).first) for _ in range(100)}
    assert cuts == {1, 2, 3}


def test_a_pair_stands_between_its_markers():
    pair = draw_pair([np.array([5, 6]), np.array([7])], lambda _, n: np.full(n, 9), np.random.default_rng(0), false=0.0)
    ids, segments, text = join_pair(pair, cls_id=1, sep_id=2)
    assert ids.tolist() == [1, 5, 6, 2, 7, 2]
    assert segments.tolist() == [0, 0, 0, 0, 1, 1]
    assert text.tolist() == [False, True, True, False, True, False]


def test_what_cannot_be_meant_is_refused():
    chance = np.random.default_rng(0)
    with pytest.raises(HanlinError, match="2 spans need 3 sentinels, there are 2"):
        corrupt_spans(np.arange(9), [(1, 2), (4, 5)], [99, 98])
    for density, mean in [(0, 3), (1, 3), (0.15, 0.5)]:
        with pytest.raises(HanlinError, match="density"):
            draw_spans(10, chance, density=density, mean=mean)
    with pytest.raises(HanlinError, match="1 tokens has nothing"):
        draw_spans(1, chance)
    with pytest.raises(HanlinError, match="source of 1 tokens"):
        longest_text(1)
    with pytest.raises(HanlinError, match="prefix and a rest"):
        draw_prefix(1, chance)
    with pytest.raises(HanlinError, match="prefix of 0"):
        prefix_targets(np.arange(3), 0)
    with pytest.raises(HanlinError, match="cut into two"):
        draw_pair([np.arange(1)], lambda _, n: np.zeros(n), chance)
