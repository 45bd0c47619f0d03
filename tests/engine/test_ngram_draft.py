"""The draft is what followed the same words the last time they stood there."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.engine.ngram_draft import NgramDraft


def search(ids: list[int], longest: int, shortest: int, most: int) -> list[int]:
    """The same by looking everywhere: no index, no state."""
    for size in range(longest, shortest - 1, -1):
        for start in range(len(ids) - size - 1, -1, -1):
            if size <= len(ids) and ids[start : start + size] == ids[len(ids) - size :]:
                text = list(ids)
                for place in range(start + size, start + size + most):
                    text.append(text[place])
                return text[len(ids) :]
    return []


@given(
    ids=st.lists(st.integers(0, 3), max_size=60),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    most=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_the_index_finds_what_a_search_finds_however_the_ids_grow(ids, sizes, most, cuts):
    shortest, longest = sorted(sizes)
    draft = NgramDraft(longest, shortest, most)
    state = draft.start()
    for cut in sorted({min(cut, len(ids)) for cut in cuts} | {len(ids)}):
        assert draft.propose(ids[:cut], state) == search(ids[:cut], longest, shortest, most)


def test_the_index_finds_what_a_search_finds_token_by_token():
    generator = random.Random(0)
    for letters in (2, 4, 9):
        draft = NgramDraft(longest=4, shortest=2, most=6)
        state, ids = draft.start(), []
        for _ in range(150):
            ids.append(generator.randrange(letters))
            assert draft.propose(ids, state) == search(ids, 4, 2, 6)


def test_the_longest_match_wins_and_among_equals_the_last():
    draft = NgramDraft(longest=3, shortest=2, most=2)
    assert draft.propose([1, 2, 3, 70, 71, 9, 2, 3, 80, 81, 1, 2, 3], draft.start()) == [70, 71]
    assert draft.propose([2, 3, 70, 71, 2, 3, 80, 81, 2, 3], draft.start()) == [80, 81]
    assert draft.propose([1, 2, 3, 4], draft.start()) == []
    assert draft.propose([5, 1, 5], draft.start()) == []  # one token is too short a match


def test_a_run_is_continued_beyond_its_end():
    draft = NgramDraft(most=7)
    assert draft.propose([8, 5, 6, 5, 6, 5, 6], draft.start()) == [5, 6, 5, 6, 5, 6, 5]
    assert draft.propose([7, 7, 7], draft.start()) == [7] * 7


@pytest.mark.parametrize("text", ["the old fox, the old dog. the old", "老狐狸追狗，老狐狸睡了。老狐狸"])
def test_text_is_continued_as_it_was(text):
    draft = NgramDraft(longest=3, shortest=2, most=3)
    ids = [ord(letter) for letter in text]
    assert "".join(map(chr, draft.propose(ids, draft.start()))) in (" do", "睡了。")


def test_fewer_tokens_can_be_asked_for_and_the_index_grows_all_the_same():
    draft = NgramDraft(most=4)
    state = draft.start()
    ids = [1, 2, 3, 4, 5, 1, 2]
    assert draft.propose(ids, state, most=0) == []
    assert draft.propose(ids, state, most=2) == [3, 4]
    assert draft.propose(ids, state, most=99) == [3, 4, 5, 1]
    assert draft.propose((*ids, 3), state, most=1) == [4]


def test_a_long_prompt_is_read_once():
    generator = random.Random(0)
    ids = [generator.randrange(1000) for _ in range(60_000)]
    draft = NgramDraft()
    state = draft.start()
    began = time.process_time()
    draft.propose(ids, state)
    first = time.process_time() - began
    began = time.process_time()
    for _ in range(100):
        ids.append(generator.randrange(1000))
        draft.propose(ids, state)
    assert time.process_time() - began < first  # a hundred steps cost less than one look at the prompt


def test_wrong_arguments_are_refused():
    for arguments in [(2, 3), (4, 0), (4, 2, 0)]:
        with pytest.raises(HanlinError, match="expected"):
            NgramDraft(*arguments)
    draft = NgramDraft()
    state = draft.start()
    draft.propose([1, 2, 3], state)
    with pytest.raises(ValueError, match="shrank"):
        draft.propose([1, 2], state)
