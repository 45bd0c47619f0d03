"""Packing: nothing lost, nothing cut, rows nearly full, every epoch anew."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.data.packing import Example, PackedExamples, pack_documents
from hanlin.nn.losses import IGNORE


def best_fit_decreasing(lengths, capacity):
    """The textbook's loop, O(n * bins)."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda place: rooms[place])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(st.integers(1, 50).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
def test_packing_is_best_fit_decreasing_and_loses_nothing(case):
    capacity, lengths = case
    bins = pack_documents(lengths, capacity)
    assert sorted(number for members in bins for number in members) == list(range(len(lengths)))
    rooms = sorted(capacity - sum(lengths[number] for number in members) for members in bins)
    assert all(room >= 0 for room in rooms)
    assert rooms == best_fit_decreasing(lengths, capacity)
    assert len(bins) <= 11 / 9 * math.ceil(sum(lengths) / capacity) + 1 or len(bins) < 2 * sum(lengths) / capacity + 1


@given(st.lists(st.integers(1, 20), max_size=60), st.randoms())
def test_the_number_of_rows_does_not_depend_on_the_order(lengths, chance):
    shuffled = chance.sample(lengths, len(lengths))
    assert len(pack_documents(lengths, 20)) == len(pack_documents(shuffled, 20))


@pytest.mark.parametrize("lengths", [[3, 11], [0]])
def test_a_length_that_does_not_fit_is_refused(lengths):
    with pytest.raises(HanlinError, match="a row holds 1 to 10"):
        pack_documents(lengths, 10)


examples_strategy = st.lists(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 9), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
        )
    ),
    min_size=1,
    max_size=15,
).map(lambda rows: [Example(ids, [*marks[:-1], True], f"chat:{number}") for number, (ids, marks) in enumerate(rows)])


@settings(deadline=None)
@given(examples=examples_strategy, rows=st.integers(1, 5), pack=st.booleans(), seed=st.integers(0, 3))
def test_every_epoch_holds_each_example_once_whole_with_its_marks(examples, rows, pack, seed):
    source = PackedExamples(examples, seq_len=12, rows_per_step=rows, seed=seed, pad_id=7, pack=pack)
    for epoch in range(3):
        found = []
        for sample in range(epoch * source.rows_per_epoch, (epoch + 1) * source.rows_per_epoch):
            batch = source.batch(sample // rows, sample % rows, sample % rows + 1)
            ids, targets, documents = batch.ids[0], batch.targets[0], batch.documents[0]
            assert (ids[documents == -1] == 7).all()
            assert (targets[documents == -1] == IGNORE).all()
            assert len(batch.names[0]) == int(documents.max()) + 1
            assert pack or len(batch.names[0]) == 1
            for number, name in enumerate(batch.names[0]):
                mine = documents == number
                assert batch.positions[0][mine].tolist() == list(range(int(mine.sum())))
                found.append((name, ids[mine].tolist(), targets[mine].tolist()))
        expected = []
        for example in examples:
            after = zip(example.ids[1:], example.trained[1:], strict=True)
            targets = [token if mine else IGNORE for token, mine in after]
            expected.append((example.name, example.ids, [*targets, IGNORE]))
        assert sorted(found) == sorted(expected)


def plain(lengths: list[int], **options) -> PackedExamples:
    examples = [Example(list(range(n)), [True] * n, f"chat:{i}") for i, n in enumerate(lengths)]
    return PackedExamples(examples, rows_per_step=4, seed=0, pad_id=0, **options)


def test_epochs_differ_and_a_seed_repeats():
    lengths = [3, 4, 5, 6] * 20
    one, same = plain(lengths, seq_len=16), plain(lengths, seq_len=16)
    first = [tuple(names) for step in range(one.steps_per_epoch) for names in one.batch(step).names]
    start = one.rows_per_epoch
    second = [tuple(one.batch(g // 4, g % 4, g % 4 + 1).names[0]) for g in range(start, 2 * start)]
    assert (
        first[: one.rows_per_epoch]
        == [tuple(names) for step in range(same.steps_per_epoch) for names in same.batch(step).names][
            : one.rows_per_epoch
        ]
    )
    assert set(first[: one.rows_per_epoch]) != set(second)


def test_long_examples_are_cut_and_counted_or_refused():
    source = plain([5, 20, 8], seq_len=8)
    assert (source.truncated, source.dropped) == (1, 0)
    rows = [source.batch(0, row, row + 1) for row in range(source.rows_per_epoch)]
    lengths = sorted(int((batch.documents[0] == n).sum()) for batch in rows for n in range(len(batch.names[0])))
    assert lengths == [5, 8, 8]
    with pytest.raises(HanlinError, match="chat:1 has 20 tokens; a row holds 8"):
        plain([5, 20, 8], seq_len=8, overlong="refuse")


def test_examples_with_nothing_to_predict_are_dropped_and_counted():
    late = Example(list(range(10)), [False] * 8 + [True] * 2, "late")
    good = Example([1, 2], [False, True], "good")
    only_first = Example([1, 2], [True, False], "first token only")
    source = PackedExamples([late, good, only_first], seq_len=8, rows_per_step=1, seed=0, pad_id=0)
    assert (source.dropped, source.truncated) == (2, 0)
    assert source.batch(0).names == [["good"]]
    with pytest.raises(HanlinError, match="None of 1 examples"):
        PackedExamples([late], seq_len=8, rows_per_step=1, seed=0, pad_id=0)
    with pytest.raises(HanlinError, match="bad has 2 tokens but 1 marks"):
        PackedExamples([Example([1, 2], [True], "bad")], seq_len=8, rows_per_step=1, seed=0, pad_id=0)


def test_the_fingerprint_sees_tokens_and_marks():
    base = Example([1, 2, 3], [False, True, True], "a")
    variants = [base, Example([1, 2, 4], base.trained, "a"), Example(base.ids, [False, False, True], "a")]
    prints = [
        str(PackedExamples([example], seq_len=8, rows_per_step=1, seed=0, pad_id=0).fingerprint())
        for example in variants
    ]
    assert len(set(prints)) == 3


def test_conversation_like_lengths_fill_rows_to_more_than_99_percent():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(3000).log_normal_(4.0, 0.7, generator=generator).clamp(2, 256).int().tolist()
    assert plain(lengths, seq_len=256).density > 0.99
