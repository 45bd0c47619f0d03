"""Batches of token shards: every token once, nothing across a border, the same whoever asks."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.core.text_sources import Document
from hanlin.data.batch import document_positions, next_token_targets
from hanlin.data.build import build_shards
from hanlin.data.mixture import Mixture
from hanlin.data.packing import Example, PackedExamples
from hanlin.data.prefetch import Prefetch
from hanlin.data.text_batches import ShardedText
from hanlin.nn.losses import IGNORE


def stream(documents, tokenizer) -> list[tuple[int, int, str]]:
    """(token, number of its document, name) of everything, by the plainest code."""
    return [
        (token, number, document.name)
        for number, document in enumerate(documents)
        for token in [*tokenizer.encode(document.text), tokenizer.eos_id]
    ]


def equal(one, other) -> bool:
    tensors = ("ids", "targets", "positions", "documents")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return same and [list(names) for names in one.names] == [list(names) for names in other.names]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 100_000])
def test_an_epoch_predicts_every_token_once_and_none_across_a_border(shards, documents, tokenizer, seq_len):
    source = ShardedText(shards, seq_len=seq_len, rows_per_step=3, shuffle=False)
    whole = stream(documents, tokenizer)
    seen, read, at = [], [], 0
    for step in range(source.steps_per_epoch):
        batch = source.batch(step, 0, min(3, source.rows_per_epoch - 3 * step))
        assert torch.equal(batch.positions, document_positions(batch.documents))
        for row in range(len(batch)):
            size = int((batch.documents[row] >= 0).sum())
            for place in range(size):
                token, number, name = whole[at]
                assert batch.ids[row, place] == token
                assert batch.names[row][int(batch.documents[row, place])] == name
                target = int(batch.targets[row, place])
                last = at + 1 == len(whole) or whole[at + 1][1] != number
                assert target == (IGNORE if last else whole[at + 1][0])
                seen += [] if last else [at + 1]
                read.append(at)
                at += 1
            assert (batch.documents[row, size:] == -1).all()
            assert (batch.targets[row, size:] == IGNORE).all()
    firsts = {at for at in range(len(whole)) if at == 0 or whole[at - 1][1] != whole[at][1]}
    assert seen == [at for at in range(len(whole)) if at not in firsts]
    assert read in (list(range(len(whole))), list(range(len(whole) - 1)))


def test_shuffled_epochs_show_every_row_once_in_another_order(shards):
    source = ShardedText(shards, seq_len=32, rows_per_step=1, seed=4)
    plain = ShardedText(shards, seq_len=32, rows_per_step=1, shuffle=False)
    epochs = [
        [source.batch(epoch * source.steps_per_epoch + i) for i in range(source.steps_per_epoch)] for epoch in (0, 1)
    ]
    key = [sorted(tuple(batch.ids[0].tolist()) for batch in epoch) for epoch in epochs]
    assert key[0] == key[1] == sorted(tuple(plain.batch(i).ids[0].tolist()) for i in range(plain.steps_per_epoch))
    assert [batch.ids.tolist() for batch in epochs[0]] != [batch.ids.tolist() for batch in epochs[1]]


def sources(shards):
    text = ShardedText(shards, seq_len=24, rows_per_step=4, seed=1)
    examples = [Example(list(range(5, 5 + n)), [False, *[True] * (n - 1)], f"e{n}") for n in range(2, 24)]
    packed = PackedExamples(examples, seq_len=24, rows_per_step=4, seed=2, pad_id=3)
    mixture = Mixture([text, packed], [3, 1], rows_per_step=4, seed=5)
    return {"text": text, "packed": packed, "mixture": mixture}


@pytest.mark.parametrize("kind", ["text", "packed", "mixture"])
def test_order_does_not_depend_on_who_asks_or_when(shards, kind):
    source, again = sources(shards)[kind], sources(shards)[kind]
    steps = list(range(30))
    expected = {step: source.batch(step) for step in steps}
    random.Random(0).shuffle(steps)
    for step in steps:  # resumed anywhere, by ranks and micro-batches of any size
        assert equal(again.batch(step), expected[step])
        for start, stop in ((0, 1), (1, 4), (2, 3)):
            assert equal(again.batch(step, start, stop), expected[step].rows(start, stop))
    assert again.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("kind", ["text", "packed", "mixture"])
def test_reading_ahead_changes_nothing(shards, kind):
    source = sources(shards)[kind]
    ahead = Prefetch(sources(shards)[kind])
    try:
        for step in [0, 1, 2, 3, 7, 8, 3, 0]:
            for start, stop in ((0, 2), (2, 4)):
                assert equal(ahead.batch(step, start, stop), source.batch(step, start, stop))
        assert ahead.fingerprint() == source.fingerprint()
        assert (ahead.rows_per_step, ahead.steps_per_epoch) == (source.rows_per_step, source.steps_per_epoch)
    finally:
        ahead.close()


def test_an_error_while_reading_ahead_reaches_the_asker():
    class Broken:
        rows_per_step, steps_per_epoch = 1, 1

        def batch(self, step, start=0, stop=None):
            raise ZeroDivisionError(f"step {step}")

        def fingerprint(self):
            return {}

    ahead = Prefetch(Broken())
    with pytest.raises(ZeroDivisionError, match="step 5"):
        ahead.batch(5)
    ahead.close()


def test_the_fingerprint_changes_with_everything_that_changes_a_batch(shards, documents, tokenizer, tmp_path):
    changed = [*documents[:-1], Document("last", "another")]
    other = build_shards(changed, tokenizer, tmp_path / "other", shard_bytes=4000)
    variants = [
        ShardedText(data, seq_len=seq_len, rows_per_step=rows, seed=seed, shuffle=shuffle)
        for data, seq_len, rows, seed, shuffle in (
            (shards, 16, 2, 0, True),
            (other, 16, 2, 0, True),
            (shards, 17, 2, 0, True),
            (shards, 16, 3, 0, True),
            (shards, 16, 2, 1, True),
            (shards, 16, 2, 0, False),
        )
    ]
    prints = [str(variant.fingerprint()) for variant in variants]
    assert len(set(prints)) == len(prints)


def test_a_mixture_keeps_its_weights_and_gives_each_sources_rows_without_gaps(shards):
    parts = sources(shards)
    rows = [str(row) for step in range(1024) for row in listed(parts["mixture"].batch(step))]
    share = {"text": 3072, "packed": 1024}
    expected = []
    for name, count in share.items():
        expected += [str(row) for step in range(count // 4) for row in listed(parts[name].batch(step))]
    assert sorted(rows) == sorted(expected)


def listed(batch) -> list:
    return [(batch.ids[row].tolist(), batch.targets[row].tolist(), list(batch.names[row])) for row in range(len(batch))]


def test_a_mixtures_epoch_lasts_until_the_slowest_source_is_through(shards):
    parts = sources(shards)
    text, packed = parts["text"], parts["packed"]
    rows = max(text.steps_per_epoch * 4 / 0.75, packed.steps_per_epoch * 4 / 0.25)
    assert parts["mixture"].steps_per_epoch == -(-rows // 4)
    alone = Mixture([text, packed], [1, 0], rows_per_step=4, seed=0)
    assert alone.steps_per_epoch == text.steps_per_epoch


def test_a_mixtures_epoch_may_be_that_of_one_source(shards):
    """Three rows of text for each packed one: an epoch of the packed ones has four times their rows."""
    parts = sources(shards)
    text, packed = parts["text"], parts["packed"]
    mixture = Mixture([text, packed], [3, 1], rows_per_step=4, seed=5, epoch_of=1)
    assert mixture.steps_per_epoch == packed.steps_per_epoch * 4 < parts["mixture"].steps_per_epoch
    assert listed(mixture.batch(3)) == listed(parts["mixture"].batch(3))  # the rows are the same
    with pytest.raises(HanlinError, match="source 0's, which has the weight 0"):
        Mixture([text, packed], [0, 1], rows_per_step=4, seed=5, epoch_of=0)


def test_a_mixture_refuses_rows_of_different_lengths_and_wrong_weights(shards):
    from hanlin.core.errors import HanlinError

    short = ShardedText(shards, seq_len=8, rows_per_step=1)
    long = ShardedText(shards, seq_len=9, rows_per_step=1)
    with pytest.raises(HanlinError, match=r"rows of \[8, 9\] tokens"):
        Mixture([short, long], [1, 1], rows_per_step=16, seed=0).batch(0)
    with pytest.raises(HanlinError, match="2 sources has 1 weights"):
        Mixture([short, long], [1], rows_per_step=4, seed=0)
    with pytest.raises(HanlinError, match="non-negative"):
        Mixture([short, long], [1, -1], rows_per_step=4, seed=0)


@settings(deadline=None, max_examples=12)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), seq_len=st.integers(2, 12))
def test_targets_are_those_of_the_seam_but_for_the_last_column(tokenizer, tmp_path_factory, lengths, seq_len):
    """The seam's `next_token_targets` knows a row alone; here the row's last token has its target too."""
    documents = [Document(str(i), "a" * length) for i, length in enumerate(lengths)]
    path = tmp_path_factory.mktemp("shards")
    shards = build_shards(documents, tokenizer, path / "s", shard_bytes=5)
    source = ShardedText(shards, seq_len=seq_len, rows_per_step=1, shuffle=False)
    for step in range(source.steps_per_epoch):
        batch = source.batch(step)
        size = int((batch.documents[0] >= 0).sum())
        seam = next_token_targets(batch.ids, batch.documents)
        assert torch.equal(batch.targets[0, : size - 1], seam[0, : size - 1])
        assert (batch.targets[0, size:] == IGNORE).all()


def test_a_row_is_read_in_well_under_a_millisecond(shards):
    import time

    source = ShardedText(shards, seq_len=512, rows_per_step=8)
    source.batch(0)
    best = min(_seconds(lambda: source.batch(1), time) for _ in range(5))
    assert best / 8 < 1e-3


def _seconds(action, time) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
