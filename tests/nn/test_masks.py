"""Each mask against a plain loop over (query, key), and the lowered form against the dense one."""

import pytest
import torch

from hanlin.nn.masks import Causal, Mask, SameDocument, Window, lower

LENGTH = 11
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1], [0] * 11, [3, 3, 1, 1, 1, 7, 7, 7, 7, 7, 0]])

RULES = {
    "causal": (Causal(), lambda row, q, k: k <= q),
    "window 1": (Causal() & Window(1), lambda row, q, k: k == q),
    "window 4": (Causal() & Window(4), lambda row, q, k: q - 4 < k <= q),
    "window of the length": (Causal() & Window(11), lambda row, q, k: k <= q),
    "window past the length": (Window(50) & Causal(), lambda row, q, k: k <= q),
    "two windows": (Causal() & Window(6) & Window(3), lambda row, q, k: q - 3 < k <= q),
    "window alone": (Window(3), lambda row, q, k: q - k < 3),
    "documents": (SameDocument(DOCUMENTS), lambda row, q, k: bool(DOCUMENTS[row, q] == DOCUMENTS[row, k])),
    "causal documents": (
        Causal() & SameDocument(DOCUMENTS),
        lambda row, q, k: k <= q and bool(DOCUMENTS[row, q] == DOCUMENTS[row, k]),
    ),
    "window and documents": (
        Causal() & SameDocument(DOCUMENTS) & Window(2),
        lambda row, q, k: q - 2 < k <= q and bool(DOCUMENTS[row, q] == DOCUMENTS[row, k]),
    ),
    "causal or document": (
        Causal() | SameDocument(DOCUMENTS),
        lambda row, q, k: k <= q or bool(DOCUMENTS[row, q] == DOCUMENTS[row, k]),
    ),
    "or within and": (
        (Causal() | Window(1)) & (SameDocument(DOCUMENTS) | Causal()),
        lambda row, q, k: (k <= q or q - k < 1) and (k <= q or bool(DOCUMENTS[row, q] == DOCUMENTS[row, k])),
    ),
}


def by_loops(rule, rows: int) -> torch.Tensor:
    return torch.tensor([[[rule(r, q, k) for k in range(LENGTH)] for q in range(LENGTH)] for r in range(rows)])


@pytest.mark.parametrize("name", RULES)
def test_dense_equals_the_rule(name):
    mask, rule = RULES[name]
    index = torch.arange(LENGTH)
    dense = mask.dense(index, index)
    assert torch.equal(dense.expand(3, -1, -1), by_loops(rule, 3))


@pytest.mark.parametrize("name", RULES)
def test_dense_of_some_queries_and_keys_is_a_part_of_the_whole(name):
    mask: Mask = RULES[name][0]
    index = torch.arange(LENGTH)
    part = mask.dense(index[4:7], index[1:9]).expand(3, -1, -1)
    assert torch.equal(part, mask.dense(index, index).expand(3, -1, -1)[:, 4:7, 1:9])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowered_says_the_same(name, dtype):
    mask, rule = RULES[name]
    lowered = lower(mask, LENGTH, dtype=dtype, device=torch.device("cpu"))
    expected = by_loops(rule, 3)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if lowered.bias is None:
        visible = causal.expand(3, -1, -1) if lowered.causal else torch.ones_like(expected)
    else:
        assert lowered.bias.dtype == dtype
        assert set(lowered.bias.unique().tolist()) <= {0.0, float("-inf")}
        visible = (lowered.bias[:, 0] == 0).expand(3, -1, -1)
    assert torch.equal(visible, expected)
    if lowered.causal:  # a promise that kernels use to skip work
        assert not (expected & ~causal).any()


def test_what_the_causal_flag_says_alone_costs_no_matrix():
    for mask in (Causal(), Causal() & Window(LENGTH), Causal() & Window(99)):
        assert lower(mask, LENGTH, dtype=torch.float32, device=torch.device("cpu")).bias is None
