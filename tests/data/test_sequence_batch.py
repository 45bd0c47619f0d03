"""Packed rows whose documents carry numbers."""

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.data.examples import Example
from hanlin.data.packing import PackedExamples
from hanlin.data.sequence_batch import SequenceBatch


def pair(number: int) -> list[Example]:
    """Two answers of different lengths to the question 100 + number."""
    question = [100 + number, 7]
    return [
        Example([*question, *range(10, 10 + n)], [False] * 2 + [True] * n, f"{number}{side}", {"score": score})
        for side, n, score in (("a", 1 + number % 4, 1.0), ("b", 3, -number / 2))
    ]


def source(**options) -> PackedExamples:
    pairs = [pair(number) for number in range(9)]
    return PackedExamples(pairs, seq_len=24, rows_per_step=3, seed=4, pad_id=0, **options)


def test_a_group_stays_in_one_row_in_its_order():
    packed, seen = source(), []
    for step in range(packed.steps_per_epoch):
        batch = packed.batch(step)
        assert isinstance(batch, SequenceBatch)
        for names in batch.names:
            assert [n[-1] for n in names] == ["a", "b"] * (len(names) // 2)
            assert [n[:-1] for n in names[::2]] == [n[:-1] for n in names[1::2]]
            seen += names
    assert {f"{n}{side}" for n in range(9) for side in "ab"} == set(seen)


def test_flat_tokens_and_numbers_are_those_of_each_document():
    batch = source().batch(0)
    trained = batch.trained
    names = [name for row in batch.names for name in row]
    assert trained.count == batch.sequences == len(names)
    for index, name in enumerate(names):
        expected = pair(int(name[:-1]))["ab".index(name[-1])]
        assert trained.ids[trained.sequence == index].tolist() == expected.ids[2:]
        assert float(batch.of_sequences("score")[index]) == expected.numbers["score"]


def test_what_is_laid_down_flat_comes_back_flat():
    batch = source().batch(0)
    values = torch.randn(len(batch.trained.ids), 2)
    again = batch.with_numbers({"weight": torch.arange(batch.sequences) * 1.5}, {"old": batch.lay_trained(values)})
    assert torch.equal(again.of_trained("old"), values)
    assert again.of_sequences("weight").tolist() == [i * 1.5 for i in range(batch.sequences)]
    own = again.tokens_of["old"][:, :, 0]
    assert torch.equal(own != 0, _own_tokens(batch))  # entry t is about token t


def _own_tokens(batch: SequenceBatch) -> torch.Tensor:
    out = torch.zeros_like(batch.trained.at)
    out[:, 1:] = batch.trained.at[:, :-1]
    return out


def test_parts_of_a_batch_say_the_same_as_the_whole():
    batch = source().batch(0)
    batch = batch.with_numbers(tokens={"old": batch.lay_trained(torch.randn(len(batch.trained.ids)))})
    parts = [batch.rows(0, 1), batch.rows(1, 3)]
    for read in (lambda b: b.of_sequences("score"), lambda b: b.of_trained("old"), lambda b: b.trained.ids):
        assert torch.equal(torch.cat([read(part) for part in parts]), read(batch))
    assert sum(part.sequences for part in parts) == batch.sequences


def test_ends_are_the_last_tokens():
    batch = source().batch(0)
    ends = batch.ends()
    assert int(ends.sum()) == batch.sequences
    last = batch.ids[ends].tolist()
    names = [name for row in batch.names for name in row]
    assert last == [pair(int(n[:-1]))["ab".index(n[-1])].ids[-1] for n in names]


def test_a_group_that_has_nothing_to_learn_is_left_out_whole():
    silent = [Example([1, 2, 3], [False, False, False], "silent", {"score": 0.0}), pair(1)[1]]
    packed = PackedExamples([pair(0), silent], seq_len=24, rows_per_step=1, seed=0, pad_id=0)
    assert packed.dropped == 1 and {n for row in packed.batch(0).names for n in row} == {"0a", "0b"}


def test_a_group_longer_than_a_row_is_refused():
    with pytest.raises(HanlinError, match="a row holds 6"):
        PackedExamples([pair(3)], seq_len=6, rows_per_step=1, seed=0, pad_id=0)


def test_other_numbers_are_other_data():
    one = PackedExamples([pair(0)], seq_len=24, rows_per_step=1, seed=0, pad_id=0).fingerprint()
    changed = [Example(e.ids, e.trained, e.name, {"score": 9.0}) for e in pair(0)]
    assert PackedExamples([changed], seq_len=24, rows_per_step=1, seed=0, pad_id=0).fingerprint() != one
