"""Batches of the pretraining methods: every token once an epoch, the same whoever asks, masks static or new."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.data.corruption.batches import MaskedBatch, PermutationBatch, PrefixBatch, Seq2SeqBatch
from hanlin.data.corruption.boundaries import SentenceTable, WordTable, spellings
from hanlin.data.corruption.denoising import Noise
from hanlin.data.corruption.rows import (
    DenoisingRows,
    MaskedRows,
    PairRows,
    PermutationRows,
    PrefixRows,
    SpanRows,
)
from hanlin.data.prefetch import Prefetch
from hanlin.data.pretraining_batches import CorruptedText, ListedDocuments, ShardDocuments
from hanlin.nn.losses import IGNORE

CLS, SEP, MASK, PAD = 400, 401, 402, 403
SENTINELS = tuple(range(460, 420, -1))
METHODS = ["masked", "words", "pairs", "prefix", "spans", "denoising", "permutation", "last"]


@pytest.fixture(scope="module")
def makers(tokenizer):
    spelt = spellings(tokenizer)
    masked = {"seq_len": 24, "cls_id": CLS, "sep_id": SEP, "mask_id": MASK, "pad_id": PAD,
              "replacements": np.arange(8, tokenizer.size)}  # fmt: skip
    sentences = SentenceTable(spelt)
    return {
        "masked": MaskedRows(**masked),
        "words": MaskedRows(**masked, words=WordTable.of(spelt)),
        "pairs": PairRows(**masked, sentences=sentences),
        "prefix": PrefixRows(24, end_id=SEP, pad_id=PAD),
        "spans": SpanRows(24, end_id=SEP, start_id=PAD, pad_id=PAD, sentinels=SENTINELS),
        "denoising": DenoisingRows(24, CLS, SEP, SEP, MASK, PAD, sentences, Noise(rotate=0.5)),
        "permutation": PermutationRows(24, PAD, (SEP, CLS)),
        "last": PermutationRows(24, PAD, spans=None, context_ordered=True),
    }


@pytest.fixture(scope="module")
def listed(documents, tokenizer):
    return ListedDocuments([tokenizer.encode(d.text) for d in documents], [d.name for d in documents])


def tensors(batch) -> dict[str, torch.Tensor]:
    return {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)}


def same(one, other) -> bool:
    a, b = tensors(one), tensors(other)
    equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return equal and type(one) is type(other) and list(one.names) == list(other.names)


def text_of(batch, row: int) -> list[int]:
    """The row's tokens as they were before they were spoiled, markers and padding left out."""
    ids = torch.where(batch.targets == IGNORE, batch.ids, batch.targets)[row]
    if isinstance(batch, PrefixBatch):
        ids = batch.ids[row]
    if isinstance(batch, Seq2SeqBatch):
        ids = batch.targets[row]
    return [t for t in ids.tolist() if t < 400 and t >= 0]


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_shows_every_token_once(makers, listed, documents, method):
    source = CorruptedText(listed, makers[method], rows_per_step=7, seed=1)
    seen: dict[str, int] = {}
    if method in ("spans", "pairs"):  # a source and a target hold a text together; a false pair only half of one
        return
    for step in range(source.steps_per_epoch):
        batch = source.batch(step, 0, min(7, source.rows_per_epoch - 7 * step))
        for row, (name,) in enumerate(batch.names):
            seen[name] = seen.get(name, 0) + len(text_of(batch, row))
    used = listed.lengths[listed.lengths >= source.maker.least]
    assert sorted(seen.values()) == sorted(used.tolist())
    assert source.dropped == len(documents) - len(used)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_the_same_whoever_asks(makers, listed, method):
    def made():
        return CorruptedText(listed, makers[method], rows_per_step=6, seed=3)

    one, ahead = made(), Prefetch(made())
    for step in (0, 5, one.steps_per_epoch):
        whole = one.batch(step)
        assert same(whole, made().batch(step)) and same(whole, ahead.batch(step))
        for start, stop in ((0, 2), (2, 6), (5, 6)):
            assert same(whole.rows(start, stop), made().batch(step, start, stop))
        assert same(whole, whole.to(torch.device("cpu")))
        shapes = {name: value.shape for name, value in tensors(whole).items()}
        assert shapes == {name: value.shape for name, value in tensors(one.batch(1)).items()}
    ahead.close()
    other = CorruptedText(listed, makers[method], rows_per_step=6, seed=4)
    assert not same(one.batch(0), other.batch(0)) and one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("method", METHODS)
def test_static_masks_return_and_dynamic_ones_do_not(makers, listed, method):
    def epochs(masks):
        source = CorruptedText(listed, makers[method], rows_per_step=1, masks=masks, shuffle=False)
        return [source.batch(epoch * source.steps_per_epoch + 2) for epoch in range(4)]

    static, cycled, dynamic = epochs(1), epochs(2), epochs(None)
    assert all(same(static[0], batch) for batch in static)
    assert same(cycled[0], cycled[2]) and same(cycled[1], cycled[3]) and not same(cycled[0], cycled[1])
    assert all(batch.names == static[0].names for batch in dynamic)
    assert sum(not same(dynamic[0], batch) for batch in dynamic[1:]) >= 2


@pytest.mark.parametrize("method", METHODS)
def test_shards_and_lists_give_the_same_batches(makers, listed, shards, method):
    one, other = (CorruptedText(d, makers[method], rows_per_step=4) for d in (listed, ShardDocuments(shards)))
    assert len(shards.shards) > 1
    assert one.steps_per_epoch == other.steps_per_epoch
    for step in range(0, one.steps_per_epoch, 3):
        assert same(one.batch(step), other.batch(step))


@pytest.mark.parametrize("method", ["masked", "words", "pairs"])
def test_masked_rows_hide_fifteen_per_cent_of_the_text_and_no_marker(makers, listed, method):
    source = CorruptedText(listed, makers[method], rows_per_step=16)
    for step in range(4):
        batch = source.batch(step)
        assert isinstance(batch, MaskedBatch)
        for row in range(16):
            ids, targets, real = batch.ids[row], batch.targets[row], batch.documents[row] >= 0
            markers = 3 if method == "pairs" else 2
            count = int(real.sum()) - markers
            assert ids[0] == CLS and ids[real][-1] == SEP and (ids[real] == SEP).sum() == markers - 1
            assert (targets[~real] == IGNORE).all() and (ids[~real] == PAD).all()
            trained = int((targets != IGNORE).sum())
            assert trained == max(1, round(0.15 * count)) or (method == "words" and trained >= 1)
            assert not ((targets != IGNORE) & ((ids == CLS) | (ids == SEP))).any()
        if method == "pairs":
            assert batch.segments is not None and batch.next_sentence is not None
            border = (batch.ids == SEP).int().cumsum(1)
            second = (batch.documents >= 0) & (border - (batch.ids == SEP).int() >= 1)
            assert torch.equal(batch.segments, second.long())


def test_false_pairs_are_of_another_document_and_true_ones_follow(makers, tokenizer):
    """Documents that share no token: whose a token is can be seen."""
    documents = ListedDocuments([np.arange(n * 30, n * 30 + 30) + 8 for n in range(9)])
    source = CorruptedText(documents, makers["pairs"], rows_per_step=200)
    batch = source.batch(0)
    assert batch.next_sentence is not None and batch.segments is not None
    original = torch.where(batch.targets == IGNORE, batch.ids, batch.targets)
    owners = torch.where(original < 400, (original - 8) // 30, -1)
    for row in range(200):
        first = set(owners[row][(batch.segments[row] == 0) & (owners[row] >= 0)].tolist())
        second = set(owners[row][(batch.segments[row] == 1) & (owners[row] >= 0)].tolist())
        assert len(first) == len(second) == 1
        assert (first == second) == (batch.next_sentence[row] == 0)
    assert 70 <= int(batch.next_sentence.sum()) <= 130


def test_prefix_rows_end_with_the_document(makers, listed):
    source = CorruptedText(listed, makers["prefix"], rows_per_step=64)
    batch = source.batch(0)
    assert isinstance(batch, PrefixBatch)
    sizes = (batch.documents >= 0).sum(1)
    assert torch.equal((batch.targets != IGNORE).sum(1), sizes - batch.prefix)
    ends = (batch.ids == SEP).sum(1)
    assert set(ends.tolist()) == {0, 1} and (batch.ids[ends == 1, sizes[ends == 1] - 1] == SEP).all()


def test_span_rows_hold_the_text_between_them(makers, listed):
    source = CorruptedText(listed, makers["spans"], rows_per_step=1, shuffle=False)
    text: list[int] = []
    for step in range(source.steps_per_epoch):
        batch = source.batch(step)
        assert isinstance(batch, Seq2SeqBatch)
        target = batch.targets[0][batch.documents[0] >= 0].tolist()
        assert batch.ids[0][batch.documents[0] >= 0].tolist() == [PAD, *target[:-1]], "shifted by the start"
        inner = batch.source[0][batch.source_documents[0] >= 0].tolist()
        assert target.pop() == SEP and inner.pop() == SEP
        for token in inner:
            if token not in SENTINELS:
                text.append(token)
                continue
            at = target.index(token) + 1
            while target[at] not in SENTINELS:
                text.append(target[at])
                at += 1
        assert batch.tokens == len(inner) + 1 + len(target) + 1
    used = [ids for ids in listed._ids if len(ids) >= 2]
    assert text == np.concatenate(used).tolist()


def test_denoising_rows_ask_for_the_whole_document(makers, listed):
    batch = CorruptedText(listed, makers["denoising"], rows_per_step=50).batch(0)
    assert isinstance(batch, Seq2SeqBatch)
    for row in range(50):
        target = batch.targets[row][batch.documents[row] >= 0].tolist()
        inner = batch.source[row][batch.source_documents[row] >= 0].tolist()
        assert target[0] == inner[0] == CLS and target[-1] == inner[-1] == SEP
        assert batch.ids[row, : len(target)].tolist() == [SEP, *target[:-1]]
        assert len(inner) <= len(target)
        assert len([t for t in inner if t < 400]) == len(target) - 2 - round(0.3 * (len(target) - 2))


@pytest.mark.parametrize("method", ["permutation", "last"])
def test_permutation_rows_name_the_places_they_ask_for(makers, listed, method):
    batch = CorruptedText(listed, makers[method], rows_per_step=50).batch(0)
    assert isinstance(batch, PermutationBatch)
    padded = batch.documents < 0
    assert (batch.order[padded] == 24).all() and (batch.order[~padded] < 24).all()
    for row in range(50):
        places = batch.predict[row][batch.predict[row] >= 0]
        assert torch.equal(places, (batch.targets[row] != IGNORE).nonzero()[:, 0])
        assert torch.equal(batch.targets[row][places], batch.ids[row][places])
        assert len(set(batch.order[row][places].tolist())) == len(places) >= 1
        assert (batch.ids[row][places] < 400).all()


def test_what_cannot_be_meant_is_refused(makers, listed):
    with pytest.raises(HanlinError, match="room for 0 tokens"):
        CorruptedText(listed, MaskedRows(2, CLS, SEP, MASK, PAD, np.arange(9)), rows_per_step=2)
    with pytest.raises(HanlinError, match="needs 2 such documents"):
        CorruptedText(ListedDocuments([[1, 2, 3], [4]]), makers["pairs"], rows_per_step=2)
    with pytest.raises(HanlinError, match="0 of 0 documents"):
        CorruptedText(ListedDocuments([]), makers["masked"], rows_per_step=2)
    with pytest.raises(HanlinError, match="masks 0"):
        CorruptedText(listed, makers["masked"], rows_per_step=2, masks=0)
    with pytest.raises(HanlinError, match="1 names for 2 documents"):
        ListedDocuments([[1], [2]], ["one"])


@pytest.mark.parametrize("change", [{"rate": 0.2}, {"seq_len": 25}, {"replacements": np.arange(9)}, {"words": 0}])
def test_the_fingerprint_knows_every_setting(makers, listed, tokenizer, change):
    from dataclasses import replace
    from json import dumps

    if "words" in change:
        change = {"words": WordTable.of(spellings(tokenizer))}
    one, other = (
        dumps(CorruptedText(listed, maker, rows_per_step=2).fingerprint())
        for maker in (makers["masked"], replace(makers["masked"], **change))
    )
    assert one != other
    assert dumps(CorruptedText(listed, makers["denoising"], rows_per_step=2).fingerprint())
