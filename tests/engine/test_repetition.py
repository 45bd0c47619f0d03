"""Measures of repetition against brute-force twins, on English, Chinese and random ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.engine.repetition import (
    distinct,
    find_loops,
    longest_repeat,
    loop_share,
    measure,
    seq_rep,
    split_units,
)

FOX = "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun until evening comes."
SPRING = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。床前明月光，疑是地上霜。"

ids = st.lists(st.integers(0, 3), max_size=40)


def test_units_are_words_and_chinese_characters():
    assert split_units("Don't say 你好世界 twice, ok?") == [
        *("Don", "'", "t", "say", "你", "好", "世", "界", "twice", ",", "ok", "?")
    ]


@given(ids, st.integers(1, 5))
def test_seq_rep_counts_ngrams_that_stood_there_before(units, n):
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert seq_rep(units, n) == pytest.approx(again / len(grams) if grams else 0.0)


@given(st.lists(ids, max_size=4), st.integers(1, 3))
def test_distinct_counts_over_all_texts_and_not_across_them(texts, n):
    grams = [tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)]
    assert distinct(texts, n) == pytest.approx(len(set(grams)) / len(grams) if grams else 1.0)


@settings(deadline=None)
@given(ids)
def test_longest_repeat_equals_trying_every_pair_of_places(units):
    best = 0
    for i in range(len(units)):
        for j in range(i + 1, len(units)):
            length = 0
            while j + length < len(units) and units[i + length] == units[j + length]:
                length += 1
            best = max(best, length)
    assert longest_repeat(units) == best


@settings(deadline=None)
@given(ids, st.integers(2, 4), st.integers(1, 9))
def test_loops_cover_what_pieces_in_a_row_cover(units, times, least):
    covered = set()
    for start in range(len(units)):
        for period in range(1, len(units) // times + 1):
            end = start + period
            while end < len(units) and units[end] == units[end - period]:
                end += 1
            if end - start >= max(times * period, least):
                covered |= set(range(start, end))
    assert loop_share(units, times=times, least=least) == pytest.approx(len(covered) / max(1, len(units)))


def test_a_loop_is_named_once_by_its_shortest_period():
    loops = find_loops([9, 8, *[1, 2, 3] * 5, 1, 7])
    assert [(loop.start, loop.end, loop.period) for loop in loops] == [(2, 18, 3)]


@pytest.mark.parametrize("text", [FOX, SPRING], ids=["en", "zh"])
def test_good_prose_has_no_loop(text):
    found = measure(text)
    assert found.loop_share == 0
    assert not found.ends_in_loop
    assert found.seq_rep_4 == 0


@pytest.mark.parametrize(("start", "piece"), [(FOX, " I see the sea!"), (SPRING, "我不知道！")], ids=["en", "zh"])
def test_a_broken_record_is_found_in_both_languages(start, piece):
    stuck, freed = measure(start + piece * 10), measure(start + piece * 10 + start)
    size, tail = len(split_units(start)), 10 * len(split_units(piece))
    assert stuck.ends_in_loop
    assert not freed.ends_in_loop
    assert stuck.loop_share == pytest.approx(tail / (size + tail))
    assert stuck.longest == tail - len(split_units(piece))
    assert stuck.seq_rep_4 > 0.4 > measure(start).seq_rep_4


def test_a_word_said_twice_is_no_loop():
    assert measure("no, no, that is very very good; 谢谢谢谢，很好很好").loop_share == 0


def test_empty_texts_measure_nothing():
    found = measure("")
    assert (found.units, found.seq_rep_4, found.distinct_2, found.longest, found.loop_share) == (0, 0.0, 1.0, 0, 0.0)


def test_ids_and_text_of_the_same_pattern_measure_the_same():
    assert measure([5, 6, 7] * 6) == measure("one two three " * 6) == measure("一二三" * 6)
