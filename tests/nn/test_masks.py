"""Each mask against a plain loop over (row, query, key), alone and combined."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.nn import mask_lowering, masks
from hanlin.nn.masks import (
    And,
    Bidirectional,
    Causal,
    Chunk,
    Dilated,
    Local,
    Mask,
    Or,
    Padding,
    Permutation,
    Prefix,
    SameDocument,
    Window,
    alternating,
    banded,
    hides_the_future,
    reach,
    sparse_transformer,
)

ROWS, LENGTH = 3, 9
COUNT = st.integers(1, LENGTH + 2)


def table(values):
    return st.lists(st.lists(values, min_size=LENGTH, max_size=LENGTH), min_size=ROWS, max_size=ROWS)


# name -> how to draw a mask, and its rule in plain Python: (row, q, k) -> bool
KINDS = {
    "bidirectional": st.just((Bidirectional(), lambda r, q, k: True)),
    "causal": st.just((Causal(), lambda r, q, k: k <= q)),
    "window": COUNT.map(lambda n: (Window(n), lambda r, q, k: k > q - n)),
    "local": COUNT.map(lambda n: (Local(n), lambda r, q, k: q - n < k < q + n)),
    "dilated": COUNT.map(lambda n: (Dilated(n), lambda r, q, k: k in range(q % n, LENGTH, n))),
    "chunk": COUNT.map(lambda n: (Chunk(n), lambda r, q, k: (q - q % n) <= k < (q - q % n) + n)),
    "banded": COUNT.map(lambda n: (banded(n), lambda r, q, k: q - n < k <= q)),
    "local and dilated": st.tuples(COUNT, COUNT).map(
        lambda n: (
            sparse_transformer(n[0], n[1], causal=False),
            lambda r, q, k: abs(q - k) < n[0] or abs(q - k) % n[1] == 0,
        )
    ),
    "sparse transformer": st.tuples(COUNT, COUNT).map(
        lambda n: (
            sparse_transformer(*n),
            lambda r, q, k: k <= q and (q - k < n[0] or (q - k) % n[1] == 0),
        )
    ),
    "prefix": st.integers(0, LENGTH + 1).map(lambda n: (Prefix(n), lambda r, q, k: k < n)),
    "prefix a row": st.lists(st.integers(0, LENGTH + 1), min_size=ROWS, max_size=ROWS).map(
        lambda n: (Prefix(torch.tensor(n)), lambda r, q, k: k < n[r])
    ),
    "documents": table(st.integers(-1, 2)).map(
        lambda ids: (SameDocument(torch.tensor(ids)), lambda r, q, k: ids[r][q] == ids[r][k])
    ),
    "padding": table(st.booleans()).map(lambda valid: (Padding(torch.tensor(valid)), lambda r, q, k: valid[r][k])),
    "content stream": st.lists(st.permutations(range(LENGTH)), min_size=ROWS, max_size=ROWS).map(
        lambda z: (Permutation(torch.tensor(z)), lambda r, q, k: z[r][k] <= z[r][q])
    ),
    "query stream": st.lists(st.permutations(range(LENGTH)), min_size=ROWS, max_size=ROWS).map(
        lambda z: (Permutation(torch.tensor(z), strict=True), lambda r, q, k: z[r][k] < z[r][q])
    ),
}


def joined(parts):
    """Two drawn masks, combined by the operator and, in plain Python, by the word of the same meaning."""

    def both(pair):
        (a, rule_a), (b, rule_b) = pair
        return a & b, lambda r, q, k: rule_a(r, q, k) and rule_b(r, q, k)

    def either(pair):
        (a, rule_a), (b, rule_b) = pair
        return a | b, lambda r, q, k: rule_a(r, q, k) or rule_b(r, q, k)

    pairs = st.tuples(parts, parts)
    return pairs.map(both) | pairs.map(either)


COMBINED = joined(st.recursive(st.one_of(*KINDS.values()), joined, max_leaves=5))


def by_loops(rule, q=tuple(range(LENGTH)), k=tuple(range(LENGTH)), rows: int = ROWS) -> torch.Tensor:
    return torch.tensor([[[bool(rule(r, i, j)) for j in k] for i in q] for r in range(rows)])


def whole(mask: Mask) -> torch.Tensor:
    index = torch.arange(LENGTH)
    dense = mask.dense(index, index)
    assert dense.dtype == torch.bool
    assert dense.dim() == 3
    return dense.expand(ROWS, LENGTH, LENGTH)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_equals_its_rule(kind):
    @settings(max_examples=200, deadline=None)
    @given(KINDS[kind])
    def check(drawn):
        mask, rule = drawn
        assert torch.equal(whole(mask), by_loops(rule)), str(mask)

    check()


@settings(max_examples=200, deadline=None)
@given(COMBINED)
def test_combinations_equal_and_and_or_of_their_rules(drawn):
    mask, rule = drawn
    assert torch.equal(whole(mask), by_loops(rule)), str(mask)


@settings(max_examples=200, deadline=None)
@given(COMBINED, st.data())
def test_dense_of_some_queries_and_keys_is_a_part_of_the_whole(drawn, data):
    mask, _ = drawn
    places = st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=5)
    q, k = data.draw(places), data.draw(places)
    part = mask.dense(torch.tensor(q), torch.tensor(k)).expand(ROWS, len(q), len(k))
    assert torch.equal(part, whole(mask)[:, q][:, :, k])


@settings(max_examples=200, deadline=None)
@given(COMBINED, st.data(), st.booleans())
def test_each_row_may_ask_for_its_own_queries_and_keys(drawn, data, keys_differ):
    mask, rule = drawn
    index = st.integers(0, LENGTH - 1)
    q = torch.tensor(data.draw(st.lists(st.tuples(index, index), min_size=ROWS, max_size=ROWS)))
    k = torch.arange(LENGTH)
    if keys_differ:
        k = torch.tensor(data.draw(st.lists(st.tuples(index, index, index), min_size=ROWS, max_size=ROWS)))
    expected = [
        by_loops(lambda _, i, j, r=r: rule(r, i, j), q[r].tolist(), (k[r] if keys_differ else k).tolist(), rows=1)[0]
        for r in range(ROWS)
    ]
    assert torch.equal(mask.dense(q, k).expand(ROWS, 2, k.shape[-1]), torch.stack(expected))


@settings(max_examples=200, deadline=None)
@given(COMBINED)
def test_what_is_said_of_a_mask_without_looking_holds(drawn):
    mask, _ = drawn
    seen = whole(mask)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    if hides_the_future(mask):
        assert not (seen & (distance < 0)).any()
    bound = reach(mask)
    if bound is not None:
        assert not (seen & (distance >= bound)).any()


def test_reach_is_the_widest_an_or_and_the_narrowest_an_and_allows():
    assert reach(Causal()) is None
    assert reach(Window(5) & Causal()) == 5
    assert reach(Causal() & Window(6) & Local(3) & Chunk(4)) == 3
    assert reach(Window(4) | Chunk(7)) == 7
    assert reach(Window(4) | Prefix(2)) is None
    assert reach(Causal() & (Local(4) | Dilated(2))) is None


def test_the_future_is_hidden_by_one_part_of_an_and_or_all_of_an_or():
    assert hides_the_future(Window(3) & Causal())
    assert hides_the_future(banded(2) | Causal())
    assert not hides_the_future(Prefix(2) | Causal())
    assert not hides_the_future(Window(1))


def test_and_and_or_are_flat_and_say_nothing_twice():
    documents = SameDocument(torch.zeros(1, 4, dtype=torch.int64))
    assert Causal() & (Window(2) & Causal()) == And((Causal(), Window(2)))
    assert Window(2) | Causal() | Window(2) == Or((Window(2), Causal()))
    assert documents & documents is documents
    assert Bidirectional() & Causal() == Causal()
    assert Bidirectional() & Bidirectional() == Bidirectional()
    assert Causal() | Window(2) | Bidirectional() == Bidirectional()
    assert Causal() & Window(2) | Window(3) == Or((And((Causal(), Window(2))), Window(3)))


def test_masks_are_values():
    assert {Causal() & Window(3), Causal() & Window(3), Prefix([1, 2]) | Causal()} == {
        banded(3),
        Prefix(torch.tensor([1, 2])) | Causal(),
    }
    assert str(Prefix(4) | Causal() & Window(3)) == "Prefix(4) | (Causal() & Window(3))"
    assert str((Prefix(4) | Causal()) & Padding(torch.ones(2, 5, dtype=torch.bool))) == (
        "(Prefix(4) | Causal()) & Padding(2 x 5)"
    )


def test_gpt3_alternates_dense_and_banded_layers():
    dense, sparse = Causal(), banded(128)
    assert alternating(dense, sparse, 5) == (dense, sparse, dense, sparse, dense)


def test_lowering_may_be_imported_from_here():
    assert masks.lower is mask_lowering.lower
    assert masks.Lowered is mask_lowering.Lowered
    with pytest.raises(AttributeError, match="no attribute 'raise_it'"):
        _ = masks.raise_it


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0), "Window: size is 0, expected a whole number of at least 1"),
        (lambda: Local(2.5), "Local: size is 2.5"),
        (lambda: Dilated(-1), "Dilated: step is -1"),
        (lambda: Chunk(True), "Chunk: size is True"),
        (lambda: Prefix(-1), "Prefix: length is -1, expected a whole number of at least 0"),
        (lambda: Prefix([2, -3]), "Prefix: length is -3"),
        (lambda: Prefix("3"), "Prefix: length is '3'"),
        (lambda: Prefix(torch.tensor(2.5)), "Prefix: length is 2.5"),
        (lambda: Prefix(()), r"Prefix: length is \(\)"),
        (lambda: Prefix(torch.ones(2, 2)), "Prefix: length is"),
        (lambda: SameDocument(torch.zeros(2, 3)), r"ids is torch.float32 of shape \(2, 3\), expected integers"),
        (lambda: SameDocument(torch.zeros(3, dtype=torch.int64)), r"of shape \(3,\), expected integers"),
        (lambda: Padding(torch.ones(2, 3, dtype=torch.int64)), "valid is torch.int64 .* expected bool"),
        (lambda: Permutation(torch.ones(2, 3, dtype=torch.bool)), "order is torch.bool .* expected integers"),
        (lambda: Prefix((1, 2)) | Prefix((1, 2, 3)), "as many rows as each other; found 2 in Prefix.*, 3 in Prefix"),
        (lambda: And(()), "at least one part"),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(HanlinError, match=message):
        make()
