"""The byte n-gram model is a proper distribution and equals a plain dictionary version; xz is what xz says."""

import lzma
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.evaluate.ngram import ByteNgram, join_documents, xz_bits_per_byte

ENGLISH = "the cat sat on the mat; the dog sat on the log, and the frog on the rock. " * 3
CHINESE = "床前明月光，疑是地上霜。举头望明月，低头思故乡。明月几时有，把酒问青天。"


def reference(text: bytes, order: int):
    """Interpolated modified Kneser-Ney, from dictionaries: p(byte, context)."""
    padded = text + bytes(order - 1)
    tables = []
    for n in range(1, order + 1):
        counts: dict[bytes, int] = defaultdict(int)
        if n == order:
            for i in range(len(text)):
                counts[padded[i : i + n]] += 1
        else:
            for gram in {padded[i : i + n + 1] for i in range(len(text))}:
                counts[gram[1:]] += 1
        n1, n2, n3, n4 = (sum(c == k for c in counts.values()) for k in (1, 2, 3, 4))
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            raw = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            discounts = [min(max(d, 0.05), top) for d, top in zip(raw, (0.95, 1.95, 2.95), strict=True)]
        else:
            discounts = [0.75] * 3
        tables.append((counts, discounts))

    def probability(byte: int, context: bytes) -> float:
        p = 1 / 256
        for n, (counts, discounts) in enumerate(tables, start=1):
            before = context[len(context) - n + 1 :]
            rows = {gram: c for gram, c in counts.items() if gram[:-1] == before}
            total = sum(rows.values())
            if total:
                taken = sum(discounts[min(c, 3) - 1] for c in rows.values())
                count = rows.get(before + bytes([byte]), 0)
                p = (count - discounts[min(count, 3) - 1] if count else 0.0) / total + taken / total * p
        return p

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 6])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_it_equals_the_plain_version(order, text):
    model = ByteNgram.train([text], order=order)
    plain = reference(join_documents([text]).tobytes(), order)
    for sample in (text.encode()[20:40], "unseen Ωords 新词".encode()):
        window = np.frombuffer(sample, np.uint8)
        expected = [plain(sample[i], sample[i - order + 1 : i]) for i in range(order - 1, len(sample))]
        np.testing.assert_allclose(model.probabilities(window), expected, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=4),
    st.integers(1, 8),
    st.binary(min_size=7, max_size=7),
)
def test_the_probabilities_after_any_context_sum_to_one(texts, order, context):
    model = ByteNgram.train(texts, order=order)
    for before in (context, join_documents(texts).tobytes()[-7:].rjust(7, b"\0")):
        tail = before[len(before) - order + 1 :]
        rows = [model.probabilities(np.frombuffer(tail + bytes([b]), np.uint8))[0] for b in range(256)]
        assert min(rows) > 0
        assert math.isclose(sum(rows), 1.0, rel_tol=1e-12)


def test_longer_contexts_help_and_the_training_text_itself_is_cheap():
    train, test = [ENGLISH, CHINESE], ["the dog sat on the mat. 低头望明月"]
    bits = [ByteNgram.train(train, order=n).bits_per_byte(test) for n in (1, 2, 4)]
    assert bits[0] > bits[1] > bits[2]
    assert ByteNgram.train([ENGLISH * 50], order=6).bits_per_byte([ENGLISH]) < 0.5


def test_random_bytes_cost_eight_bits():
    noise = np.random.default_rng(0).integers(1, 256, 1_200_000, dtype=np.uint8).tobytes()
    assert abs(ByteNgram.train([noise[:1_000_000]], order=1).bits_per_byte([noise[1_000_000:]]) - 8) < 0.02


def test_the_end_of_a_document_costs_bits_but_is_no_byte():
    model = ByteNgram.train(["ab", "ab", "ab"], order=2)
    ab = np.frombuffer(b"\0ab\0", np.uint8)
    bits = -np.log2(model.probabilities(ab)).sum()
    assert math.isclose(model.bits_per_byte(["ab"]), bits / 2, rel_tol=1e-12)


def test_long_texts_are_measured_in_parts(monkeypatch):
    model = ByteNgram.train([ENGLISH, CHINESE])
    whole = model.bits_per_byte([ENGLISH[5:], CHINESE])
    monkeypatch.setattr("hanlin.evaluate.ngram.PART", 17)
    assert math.isclose(model.bits_per_byte([ENGLISH[5:], CHINESE]), whole, rel_tol=1e-12)


@pytest.mark.parametrize("order", [0, 9])
def test_an_order_that_does_not_fit_is_refused(order):
    with pytest.raises(HanlinError, match=f"is {order}; it must be between 1 and 8"):
        ByteNgram.train(["text"], order=order)


def test_no_text_is_refused():
    for texts in ([], [""]):
        with pytest.raises(HanlinError, match="no text"):
            ByteNgram.train(texts)


def test_xz_pays_only_for_what_is_new():
    rng = np.random.default_rng(1)
    noise = [bytes(rng.integers(1, 256, 40_000, dtype=np.uint8)) for _ in range(2)]
    assert xz_bits_per_byte([noise[0]], [noise[0]]) < 0.2
    assert abs(xz_bits_per_byte([noise[0]], [noise[1]]) - 8) < 0.1


def test_xz_is_what_the_library_says():
    train, test = [ENGLISH, CHINESE], ["the dog 望明月"]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]

    def size(texts):
        data = b"".join(t.encode() + b"\0" for t in texts)
        return len(lzma.compress(data, check=lzma.CHECK_NONE, filters=filters))

    expected = (size(train + test) - size(train)) * 8 / len(test[0].encode())
    assert xz_bits_per_byte(train, test) == expected
