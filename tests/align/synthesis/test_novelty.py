"""ROUGE-L against the textbook's table, on random words; what a pool calls a repetition."""

import random

import pytest

from hanlin.align.synthesis.novelty import Pool, rouge_l, words


def table_rouge_l(a, b):
    """The quadratic table, as every book has it."""
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    lcs = best[-1][-1]
    if not lcs:
        return 0.0
    precision, recall = lcs / len(b), lcs / len(a)
    return 2 * precision * recall / (precision + recall)


def test_rouge_l_is_the_tables_on_random_words():
    chances = random.Random(0)
    for _ in range(300):
        a, b = (
            [chances.choice("abcdefg"[: chances.randint(1, 7)]) for _ in range(chances.randint(0, 90))]
            for _ in range(2)
        )
        assert rouge_l(a, b) == pytest.approx(table_rouge_l(a, b), abs=1e-12)


def test_words_are_words_in_english_and_characters_in_chinese():
    assert words("The Fox's 3rd jump, ＡＢＣ!") == ["the", "fox", "s", "3rd", "jump", "abc"]
    assert words("请把3月的天气写成诗。") == ["请", "把", "3", "月", "的", "天", "气", "写", "成", "诗"]


def test_a_pool_finds_exactly_what_brute_force_finds():
    chances = random.Random(1)
    texts = [" ".join(chances.choice("abcdef") for _ in range(chances.randint(3, 12))) for _ in range(120)]
    pool, taken = Pool(near=0.7), []
    for text in texts:
        near = any(table_rouge_l(words(known), words(text)) >= 0.7 for known in taken)
        assert (pool.repeats(text) is not None) == near
        if not near:
            pool.add(text)
            taken.append(text)
    assert 10 < len(taken) < 110


def test_above_one_only_equal_words_are_the_same():
    pool = Pool(["把这句话翻译成英文。"], near=1.01)
    assert pool.repeats("把这句话翻译成英文!") == "把这句话翻译成英文。"
    assert pool.repeats("把这段话翻译成英文。") is None
