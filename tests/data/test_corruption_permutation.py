"""Permutation orders: what is predicted, in which order, and what the two streams see."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.data.corruption.permutation_lm import choose_last, choose_spans, count_predicted, draw_order
from hanlin.nn.masks import Permutation


def runs(chosen: np.ndarray) -> list[int]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.floats(1.1, 10), st.integers(0, 99), st.integers(1, 6))
def test_about_one_in_k_is_predicted_and_never_a_marker(allowed, one_in, seed, longest):
    allowed = np.array(allowed, dtype=bool)
    last = choose_last(allowed, np.random.default_rng(seed), one_in=one_in)
    spans = choose_spans(allowed, np.random.default_rng(seed), one_in=one_in, longest=longest)
    assert not ((last | spans) & ~allowed).any()
    assert last.sum() == (max(1, int(allowed.sum() // one_in)) if allowed.any() else 0)
    assert spans.sum() <= len(allowed) // one_in + longest
    assert spans.any() == allowed.any()
    if len(allowed) > 1:
        assert not spans.all()


def test_spans_are_uniform_in_length_and_take_one_in_k():
    spans = choose_spans(np.ones(200_000, dtype=bool), np.random.default_rng(0))
    assert spans.mean() == pytest.approx(1 / 6, abs=0.002)
    single = Counter(length for length in runs(spans) if length <= 5)  # two may touch: those are longer, and rare
    mean = sum(length * n for length, n in single.items()) / single.total()
    assert mean == pytest.approx(3, abs=0.1) and max(single.values()) / min(single.values()) < 1.2


def test_spans_are_those_of_transformers():
    """Share predicted and lengths of runs, against its collator on the same lengths; both are samples."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<mask>": 1} | {f"w{n}": n for n in range(2, 50)}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>", mask_token="<mask>",
    )  # fmt: skip
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(2, 50, (4000, 120))
    batch = transformers.DataCollatorForPermutationLanguageModeling(theirs)([{"input_ids": r.tolist()} for r in ids])
    found = (batch["labels"] != -100).numpy()
    chance = np.random.default_rng(1)
    ours = np.stack([choose_spans(np.ones(120, dtype=bool), chance) for _ in ids])
    assert ours.mean() == pytest.approx(found.mean(), rel=0.01)
    lengths = [Counter(length for row in rows for length in runs(row)) for rows in (found, ours)]
    for length in range(1, 6):
        shares = [count[length] / count.total() for count in lengths]
        assert shares[0] == pytest.approx(shares[1], abs=0.015)
    # perm_mask 1: hidden. Context hides from nobody, and a predicted token hides from the context: so does our order.
    hidden, predicted = batch["perm_mask"][0].bool(), torch.from_numpy(found[0])
    order = torch.from_numpy(draw_order(found[0], chance))[None]
    mine = ~Permutation(order, strict=True).dense(torch.arange(120), torch.arange(120))[0]
    assert not hidden[:, ~predicted].any() and not mine[predicted][:, ~predicted].any()
    assert hidden[~predicted][:, predicted].all() and mine[~predicted][:, predicted].all()
    both = predicted.sum() * (predicted.sum() + 1) // 2  # each of two predicted tokens is hidden from one of them
    assert hidden[predicted][:, predicted].sum() == mine[predicted][:, predicted].sum() == both


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 99), st.booleans())
def test_ranks_make_the_masks_of_both_streams(predicted, seed, context_ordered):
    """By brute force from the order itself: place z_t sees z_1 … z_t (content), z_1 … z_t-1 (query)."""
    predicted = np.array(predicted, dtype=bool)
    ranks = draw_order(predicted, np.random.default_rng(seed), context_ordered=context_ordered)
    count = len(ranks)
    assert len(set(ranks[predicted])) == predicted.sum()
    if predicted.any() and not predicted.all():
        assert ranks[predicted].min() > ranks[~predicted].max()
    if context_ordered:
        assert sorted(ranks) == list(range(count)) or predicted.all()
    else:
        assert (ranks[~predicted] == 0).all()
    order = sorted(range(count), key=lambda place: ranks[place])
    index, table = torch.arange(count), torch.from_numpy(ranks)[None]
    content, query = Permutation(table).dense(index, index)[0], Permutation(table, strict=True).dense(index, index)[0]
    for turn, place in enumerate(order):
        earlier = set(order[:turn])
        tied = {p for p in range(count) if not predicted[p]} if not context_ordered and not predicted[place] else set()
        for other in range(count):
            assert bool(content[place, other]) == (other in earlier | tied | {place})
            if predicted[place]:
                assert bool(query[place, other]) == (other in earlier)


def test_every_order_is_equally_likely():
    chance = np.random.default_rng(0)
    seen = Counter(tuple(draw_order(np.array([True, False, True, True]), chance).tolist()) for _ in range(3000))
    assert len(seen) == 6 and all(abs(n - 500) < 95 for n in seen.values())
    whole = Counter(
        tuple(draw_order(np.array([True, False, True, False]), chance, context_ordered=True).tolist())
        for _ in range(2000)
    )
    assert len(whole) == 4 and all(abs(n - 500) < 95 for n in whole.values())


def test_the_last_sixth_of_a_uniform_order():
    chance = np.random.default_rng(0)
    times = sum(choose_last(np.ones(12, dtype=bool), chance).astype(int) for _ in range(3000))
    assert all(abs(n - 500) < 95 for n in times)
    assert count_predicted(512, 6) == 85


def test_what_cannot_be_meant_is_refused():
    chance, every = np.random.default_rng(0), np.ones(4, dtype=bool)
    with pytest.raises(HanlinError, match="One in 1 tokens"):
        choose_last(every, chance, one_in=1)
    with pytest.raises(HanlinError, match="at most 0 tokens"):
        choose_spans(every, chance, longest=0)
