"""Every lowering of a mask gives the same attention, and the cheapest exact one is chosen."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from tests.nn.test_masks import COMBINED, KINDS, LENGTH, ROWS, by_loops, whole
from torch.nn.attention.flex_attention import flex_attention

from hanlin.nn.block_attention import block_attention
from hanlin.nn.mask_lowering import Lowered, explain, lower, lower_flex
from hanlin.nn.masks import (
    Bidirectional,
    Causal,
    Chunk,
    Dilated,
    Local,
    Mask,
    Padding,
    Permutation,
    Prefix,
    SameDocument,
    Window,
    banded,
)

CPU = torch.device("cpu")
TRIANGLE = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
PADDED = torch.arange(LENGTH).expand(ROWS, -1) < torch.tensor([[LENGTH], [4], [0]])
FLEX = {
    "bidirectional": Bidirectional(),
    "causal": Causal(),
    "window": Causal() & Window(3),
    "chunk": Causal() & Chunk(4),
    "dilated": Local(2) | Dilated(3),
    "prefix a row": Prefix((1, 4, 7)) | Causal(),
    "documents": Causal() & SameDocument(torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, -1], [0] * 9, [1] * 4 + [3] * 5])),
    "one row of documents": SameDocument(torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]])),
    "padding, one row all of it": Padding(PADDED),
    "query stream": Permutation(torch.stack([torch.randperm(LENGTH) for _ in range(ROWS)]), strict=True),
}


def heads(*sizes: int, seed: int = 0) -> list[torch.Tensor]:
    """q, k and v of two heads in fp64: (ROWS, 2, size, 4)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, 2, size, 4, generator=generator, dtype=torch.float64) for size in sizes]


def by_definition(q, k, v, visible):
    """Attention one query at a time over the keys it sees; zero over none. visible (ROWS, Tq, Tk)."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for r, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = visible[r, t].nonzero()[:, 0]
        if len(seen):
            weights = (k[r, h, seen] @ q[r, h, t] / q.shape[-1] ** 0.5).softmax(0)
            out[r, h, t] = weights @ v[r, h, seen]
    return out


def through_sdpa(q, k, v, lowered: Lowered):
    out = F.scaled_dot_product_attention(q, k, v, lowered.bias, is_causal=lowered.causal and lowered.bias is None)
    return out if lowered.blind is None else out.masked_fill(lowered.blind, 0.0)


def through_blocks(q, k, v, lowered: Lowered):
    out = block_attention(q, k, v, lowered.bias, q.shape[-1] ** -0.5, causal=lowered.causal)
    return out if lowered.blind is None else out.masked_fill(lowered.blind, 0.0)


def seen_through(lowered: Lowered, queries: int = LENGTH, keys: int = LENGTH) -> torch.Tensor:
    if lowered.bias is None:
        assert lowered.blind is None
        return (TRIANGLE if lowered.causal else torch.ones(queries, keys, dtype=torch.bool)).expand(ROWS, -1, -1)
    assert lowered.bias.shape[1:] == (1, queries, keys)
    assert set(lowered.bias.unique().tolist()) <= {0.0, float("-inf")}
    assert (lowered.bias == 0).any(-1).all()  # a softmax over -inf alone would be NaN
    seen = lowered.bias[:, 0] == 0
    return (seen if lowered.blind is None else seen & ~lowered.blind[:, 0]).expand(ROWS, -1, -1)


@settings(max_examples=200, deadline=None)
@given(COMBINED)
def test_lowered_says_the_same_as_the_rule(drawn):
    mask, rule = drawn
    lowered = lower(mask, LENGTH, dtype=torch.float32, device=CPU)
    expected = by_loops(rule)
    assert torch.equal(seen_through(lowered), expected), str(mask)
    if lowered.causal:  # a promise that kernels use to skip work
        assert not (expected & ~TRIANGLE).any()
    if (lowered.blind is not None) != bool((~expected.any(-1)).any()):
        raise AssertionError(f"{mask}: blind queries are marked if and only if there are any")


@settings(max_examples=100, deadline=None)
@given(COMBINED)
def test_lowered_gives_the_same_attention(drawn):
    mask, rule = drawn
    q, k, v = heads(LENGTH, LENGTH, LENGTH)
    lowered = lower(mask, LENGTH, dtype=q.dtype, device=CPU)
    expected = by_definition(q, k, v, by_loops(rule))
    assert (through_sdpa(q, k, v, lowered) - expected).abs().max() <= 1e-10
    assert (through_blocks(q, k, v, lowered) - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "keys"), [(LENGTH, 1), (LENGTH, 5), (3, LENGTH)])
def test_cross_attention_counts_its_own_keys(kind, queries, keys):
    @settings(max_examples=20, deadline=None)
    @given(KINDS[kind])
    def check(drawn):
        mask, rule = drawn
        lowered = lower(mask, queries, dtype=torch.float32, device=CPU, keys=keys)
        assert torch.equal(seen_through(lowered, queries, keys), by_loops(rule, range(queries), range(keys)))

    check()


def test_more_keys_than_queries_are_no_square_for_the_causal_flag():
    lowered = lower(Causal(), 4, dtype=torch.float64, device=CPU, keys=LENGTH)
    assert not lowered.causal
    q, k, v = heads(4, LENGTH, LENGTH)
    expected = by_definition(q, k, v, whole(Causal())[:, :4])
    assert (through_sdpa(q, k, v, lowered) - expected).abs().max() <= 1e-10


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("case", FLEX)
def test_flex_attention_gives_the_same_attention(case):
    mask: Mask = FLEX[case]
    q, k, v = heads(LENGTH, LENGTH, LENGTH)
    block_mask = lower_flex(mask, LENGTH, block=16)
    expected = by_definition(q, k, v, whole(mask))
    assert (flex_attention(q, k, v, block_mask=block_mask) - expected).abs().max() <= 1e-10
    lowered = lower(mask, LENGTH, dtype=q.dtype, device=CPU)
    assert (through_sdpa(q, k, v, lowered) - expected).abs().max() <= 1e-10


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_takes_cross_attention():
    q, k, v = heads(4, LENGTH, LENGTH)
    mask = Padding(PADDED)
    out = flex_attention(q, k, v, block_mask=lower_flex(mask, 4, keys=LENGTH, block=16))
    assert (out - by_definition(q, k, v, whole(mask)[:, :4])).abs().max() <= 1e-10


def test_flex_blocks_that_nobody_sees_are_left_out():
    block_mask = lower_flex(Causal() & Window(16), 64, block=16)
    assert block_mask.kv_num_blocks.flatten().tolist() == [1, 2, 2, 2]  # of 4 each
    assert lower_flex(Bidirectional(), 64, block=16).full_kv_num_blocks.flatten().tolist() == [4] * 4


@pytest.mark.parametrize("through", [through_sdpa, through_blocks])
def test_a_query_that_sees_no_key_gives_zero_and_takes_no_gradient(through):
    order = torch.tensor([[2, 0, 1, 5, 4, 3, 8, 7, 6]])  # token 1 comes first: its query stream sees nothing
    q, k, v = (x.requires_grad_() for x in heads(LENGTH, LENGTH, LENGTH))
    lowered = lower(Permutation(order, strict=True), LENGTH, dtype=q.dtype, device=CPU)
    out = through(q, k, v, lowered)
    assert (out[:, :, 1] == 0).all()
    assert out.isfinite().all()
    gradients = torch.autograd.grad(out[:, :, 1].sum(), (q, k, v), retain_graph=True)
    assert all((gradient == 0).all() for gradient in gradients)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, 1] == 0).all()


def test_a_forgotten_zero_is_still_finite():
    lowered = lower(Padding(PADDED), LENGTH, dtype=torch.float64, device=CPU)
    q, k, v = heads(LENGTH, LENGTH, LENGTH)
    assert lowered.blind is not None
    assert block_attention(q, k, v, lowered.bias, 0.5, causal=False).isfinite().all()


ALL = torch.ones(ROWS, LENGTH, dtype=torch.bool)
FREE = {
    "nothing": [
        Bidirectional(),
        Window(LENGTH),
        Local(LENGTH),
        Chunk(LENGTH),
        Dilated(1),
        Prefix(LENGTH) | Causal(),
        Prefix([LENGTH, 99, LENGTH]),
        Padding(ALL),
        Window(99) & Padding(ALL),
    ],
    "flag": [
        Causal(),
        Causal() & Window(LENGTH),
        Causal() & Window(99) & Chunk(LENGTH),
        Padding(ALL) & Causal(),
        Prefix(1) | Causal(),
        Causal() | Prefix([0, 1, 1]),
    ],
}


@pytest.mark.parametrize(("form", "mask"), [(form, mask) for form, some in FREE.items() for mask in some], ids=str)
def test_what_needs_no_matrix_gets_none(form, mask):
    lowered = lower(mask, LENGTH, dtype=torch.float32, device=CPU)
    assert (lowered.causal, lowered.bias, lowered.blind) == (form == "flag", None, None)
    said = explain(mask, LENGTH)
    assert said.startswith("Nothing" if form == "nothing" else "The causal flag")
    assert ("because" in said) == (mask not in (Causal(), Bidirectional()))


@pytest.mark.parametrize(
    "mask",
    [Window(LENGTH - 1), Causal() & Chunk(LENGTH - 1), Prefix(2) | Causal(), Padding(PADDED), Dilated(2)],
    ids=str,
)
def test_what_needs_a_matrix_says_so(mask):
    assert lower(mask, LENGTH, dtype=torch.float32, device=CPU).bias is not None
    assert explain(mask, LENGTH).startswith(f"A dense bias of {mask.rows} x {LENGTH} x {LENGTH}, because {mask} ")


def test_explain_gives_the_reason():
    assert explain(banded(50), 11) == (
        "The causal flag, which costs no matrix, over 11 tokens, "
        "because Causal() & Window(50) says no more than Causal() at this length."
    )
    assert explain(banded(5), 11) == (
        "A dense bias of 1 x 11 x 11, because Causal() & Window(5) hides other keys than the causal flag would; "
        "it hides all that the flag hides, so later blocks are still skipped."
    )
    assert "not equally many" in explain(Causal(), 4, keys=9)
    assert explain(Bidirectional(), 4, keys=9) == "Nothing: over 4 queries and 9 keys every query sees every key."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_has_the_dtype_of_the_activations(dtype):
    assert lower(banded(2), LENGTH, dtype=dtype, device=CPU).bias.dtype == dtype


def test_padding_costs_one_row_a_sequence_and_not_a_matrix():
    bias = lower(Padding(PADDED[:2]), LENGTH, dtype=torch.float32, device=CPU).bias
    assert bias.untyped_storage().nbytes() == 2 * LENGTH * 4


@pytest.mark.parametrize("first", ["masks", "mask_lowering"])
def test_either_file_may_be_imported_first(first):
    code = f"import hanlin.nn.{first}; from hanlin.nn.masks import lower; print(lower.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, timeout=60)
    assert done.stdout.strip() == "hanlin.nn.mask_lowering", done.stderr
