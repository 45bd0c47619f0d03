"""Masked rows: how many, which, and what becomes of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.data.corruption.boundaries import SentenceTable, WordTable, spellings
from hanlin.data.corruption.masked_lm import choose_tokens, mask_tokens
from hanlin.nn.losses import IGNORE

MASK, ORDINARY = 3, np.arange(10, 200)


def within(found: int, count: int, share: float, deviations: float = 4.5) -> bool:
    """Whether `found` successes of `count` are likely for this share (one in 100,000 is not)."""
    return abs(found - share * count) <= deviations * np.sqrt(count * share * (1 - share))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.floats(0.01, 1), st.integers(0, 9))
def test_the_share_is_exact_and_only_maskable_tokens_are_chosen(maskable, rate, seed):
    allowed = np.array(maskable, dtype=bool)
    chosen = choose_tokens(allowed, np.random.default_rng(seed), rate=rate)
    assert not (chosen & ~allowed).any()
    assert chosen.sum() == (max(1, round(rate * allowed.sum())) if allowed.any() else 0)


def test_every_token_is_chosen_equally_often():
    chance = np.random.default_rng(0)
    times = sum(choose_tokens(np.ones(20, dtype=bool), chance).astype(int) for _ in range(4000))
    assert all(within(int(found), 4000, 3 / 20) for found in times)


def test_of_the_chosen_80_10_10_and_nothing_else_is_touched():
    chance = np.random.default_rng(1)
    ids = chance.choice(ORDINARY, 60_000)
    chosen = choose_tokens(np.ones(len(ids), dtype=bool), chance)
    spoiled, targets = mask_tokens(ids, chosen, chance, mask_id=MASK, replacements=ORDINARY)
    assert (spoiled[~chosen] == ids[~chosen]).all() and (targets[~chosen] == IGNORE).all()
    assert (targets[chosen] == ids[chosen]).all()
    count = int(chosen.sum())
    kept, masked = spoiled[chosen] == ids[chosen], spoiled[chosen] == MASK
    assert within(int(masked.sum()), count, 0.8)
    assert within(int(kept.sum()), count, 0.1 + 0.1 / len(ORDINARY))  # a random token may be the token itself
    random = spoiled[chosen][~kept & ~masked]
    assert np.isin(random, ORDINARY).all() and len(np.unique(random)) > 0.95 * len(ORDINARY)


def test_proportions_are_those_of_transformers():
    """Its collator draws each token independently; the shares must agree within the noise of both."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3} | {f"w{n}": n for n in range(4, 200)}
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]")),
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    torch.manual_seed(0)
    ids = np.random.default_rng(2).integers(4, 200, (200, 128))
    batch = DataCollatorForLanguageModeling(theirs)([{"input_ids": row.tolist()} for row in ids])
    chance = np.random.default_rng(3)
    shares = []
    for spoiled, targets in [
        (batch["input_ids"].numpy(), batch["labels"].numpy()),
        mask_tokens(
            ids.ravel(),
            np.concatenate([choose_tokens(np.ones(128, dtype=bool), chance) for _ in ids]),
            chance,
            mask_id=3,
            replacements=np.arange(200),
        ),
    ]:
        chosen = targets.ravel() != -100
        seen, true = spoiled.ravel()[chosen], ids.ravel()[chosen]
        shares.append([chosen.mean(), (seen == 3).mean(), ((seen != true) & (seen != 3)).mean()])
    assert np.allclose(shares[0], shares[1], atol=0.025)


def test_the_same_seed_gives_the_same_mask_and_another_another():
    ids = np.arange(10, 110)

    def once(seed):
        chance = np.random.default_rng(seed)
        chosen = choose_tokens(np.ones(100, dtype=bool), chance)
        return mask_tokens(ids, chosen, chance, mask_id=MASK, replacements=ORDINARY)

    assert all((a == b).all() for a, b in zip(once(5), once(5), strict=True))
    assert (once(5)[1] != once(6)[1]).any()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=30), st.data())
def test_whole_words_are_masked_whole(lengths, data):
    words = np.repeat(np.arange(len(lengths)), lengths)
    maskable = np.ones(len(words), dtype=bool)
    maskable[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.booleans())
    chosen = choose_tokens(maskable, np.random.default_rng(data.draw(st.integers(0, 99))), words=words, rate=0.3)
    for word in range(len(lengths)):
        assert len(set(chosen[words == word])) == 1
    assert not (chosen & ~maskable).any()
    whole = [n for word, n in enumerate(lengths) if maskable[words == word].all()]
    wanted = max(1, round(0.3 * maskable.sum()))
    if whole:
        assert 1 <= chosen.sum() <= max(wanted, max(whole))
        if min(whole) > wanted:
            assert chosen.sum() in whole  # one word where none fits


def test_words_are_those_of_the_text_in_english_and_chinese(tokenizer):
    """The word numbers split the text exactly where an independent reading of the characters does."""
    table = WordTable.of(spellings(tokenizer))
    text = "the models' numbers 读书 writesabout语言model翰林 x1y2, and"
    ids = np.array(tokenizer.encode(text))
    numbers = table.numbers(ids)
    pieces = [tokenizer.decode_bytes(ids[numbers == word].tolist()).decode() for word in range(numbers[-1] + 1)]
    assert "".join(pieces) == text
    plain = [piece.strip() for piece in pieces]
    for word in ("models", "numbers", "writesabout", "model", "x1y2", "and"):
        assert word in plain
    assert {"读", "书"} <= set(plain) or "读书" in plain
    assert all(piece == "model" or not piece.endswith(("语言model", "言model")) for piece in plain)


def test_a_character_cut_in_two_is_one_word(tokenizer):
    rare = "鱻"
    ids = np.array(tokenizer.encode(rare * 2))
    assert len(ids) == 6, "three bytes each, no merge"
    assert WordTable.of(spellings(tokenizer)).numbers(ids).tolist() == [0, 0, 0, 1, 1, 1]


def test_word_pieces_continue_words():
    table = WordTable.of_wordpieces(["[PAD]", "un", "##want", "##ed", "runn", "##ing", "中"])
    assert table.numbers(np.array([1, 2, 3, 4, 5, 6, 6])).tolist() == [0, 0, 0, 1, 1, 2, 3]


def test_sentences_end_where_they_do_in_english_and_chinese(tokenizer):
    table = SentenceTable(spellings(tokenizer))
    text = 'It costs 3.14 now. (Really?)Yes! "No." 今天读书。“明天写字！”\n好'
    ids = np.array(tokenizer.encode(text))
    parts = [tokenizer.decode_bytes(part.tolist()).decode() for part in table.split(ids)]
    expected = ["It costs 3.14 now.", " (Really?)", "Yes!", ' "No."', " 今天读书。", "“明天写字！”\n", "好"]
    assert parts == expected
    assert (np.concatenate(table.split(ids)) == ids).all()
    assert table.split(ids[:0]) == []


def test_what_cannot_be_meant_is_refused():
    chance, every = np.random.default_rng(0), np.ones(4, dtype=bool)
    for rate in (0, -0.1, 1.5):
        with pytest.raises(HanlinError, match="masking rate"):
            choose_tokens(every, chance, rate=rate)
    with pytest.raises(HanlinError, match="3 word numbers for 4 tokens"):
        choose_tokens(every, chance, words=np.arange(3))
    with pytest.raises(HanlinError, match="at most 1"):
        mask_tokens(np.arange(4), every, chance, mask_id=0, replacements=ORDINARY, masked=0.9, replaced=0.2)
    with pytest.raises(HanlinError, match="names none"):
        mask_tokens(np.arange(4), every, chance, mask_id=0, replacements=ORDINARY[:0])
