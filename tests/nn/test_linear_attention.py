"""Linear attention against the sum over pairs, one query and one key at a time, in fp64: values and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.nn.linear_attention import (
    FEATURE_MAPS,
    LinearAttention,
    linear_attention,
    linear_state,
    recurrent_step,
)
from hanlin.nn.masks import Bidirectional, Causal, Mask, Padding, SameDocument, Window

EXACT = {"rtol": 0, "atol": 1e-10}

PHI = {
    "elu+1": lambda x: x + 1 if x > 0 else math.exp(x),
    "relu": lambda x: max(x, 0.0),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "exp": math.exp,
}
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5]])
VALID = torch.tensor([[False, True, True, True, False, True, True, True, False], [True] * 9])

MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "both ways": Bidirectional(),
    "causal documents": Causal() & SameDocument(DOCUMENTS),
    "documents": SameDocument(DOCUMENTS),
    "padding": Padding(VALID),
    "causal padding": Padding(VALID) & Causal(),
    "padded documents": SameDocument(DOCUMENTS) & Padding(VALID),
    "causal padded documents": Causal() & SameDocument(DOCUMENTS) & Padding(VALID),
}


def numbers(length: int = 9, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, 3, length, D, dtype=torch.float64, requires_grad=True) for D in (4, 4, 5)]


def by_loops(q, k, v, mask: Mask, feature: str = "elu+1") -> torch.Tensor:
    """Forward only, number by number."""
    rows, heads, length, D = q.shape
    index = torch.arange(length)
    visible = mask.dense(index, index).expand(rows, length, length).tolist()
    phi, q, k, v = PHI[feature], q.tolist(), k.tolist(), v.tolist()
    out = torch.zeros(rows, heads, length, len(v[0][0][0]), dtype=torch.float64)
    for r in range(rows):
        for h in range(heads):
            for i in range(length):
                total = 0.0
                for j in range(length):
                    if visible[r][i][j]:
                        weight = sum(phi(q[r][h][i][d]) * phi(k[r][h][j][d]) for d in range(D))
                        total += weight
                        for m, number in enumerate(v[r][h][j]):
                            out[r, h, i, m] += weight * number
                if total:
                    out[r, h, i] /= total
    return out


def by_pairs(q, k, v, mask: Mask, feature: str = "elu+1") -> torch.Tensor:
    """The same with all pairs in one matrix, for gradients."""
    index = torch.arange(q.shape[2])
    weights = FEATURE_MAPS[feature](q) @ FEATURE_MAPS[feature](k).transpose(-1, -2)
    weights = weights * mask.dense(index, index)[:, None]
    total = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(total == 0, 1, total)


@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 64])
@pytest.mark.parametrize("name", MASKS)
def test_each_mask_equals_the_loops(name, chunk):
    q, k, v = numbers()
    out = linear_attention(q, k, v, MASKS[name], chunk=chunk)
    torch.testing.assert_close(out, by_loops(q, k, v, MASKS[name]), **EXACT)
    pairs = by_pairs(q, k, v, MASKS[name])
    torch.testing.assert_close(out, pairs, **EXACT)
    direction = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), direction), torch.autograd.grad(pairs, (q, k, v), direction), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("mask", [Causal(), Bidirectional()], ids=["causal", "both ways"])
@pytest.mark.parametrize("feature", FEATURE_MAPS)
def test_each_feature_map_equals_the_loops(feature, mask):
    q, k, v = numbers()
    out = linear_attention(q, k, v, mask, feature=feature, chunk=4)
    torch.testing.assert_close(out, by_loops(q, k, v, mask, feature), **EXACT)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_documents_and_padding_equal_the_pairs(data):
    length = data.draw(st.integers(1, 12))
    breaks = data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=2, max_size=2))
    valid = data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=2, max_size=2))
    mask = SameDocument(torch.tensor(breaks).int().cumsum(1)) & Padding(torch.tensor(valid))
    if data.draw(st.booleans()):
        mask = mask & Causal()
    q, k, v = numbers(length, seed=1)
    out = linear_attention(q, k, v, mask, chunk=data.draw(st.integers(1, 13)))
    torch.testing.assert_close(out, by_pairs(q, k, v, mask), **EXACT)


def test_a_query_that_sees_nothing_gets_0():
    q, k, v = numbers()
    out = linear_attention(q, k, v, Causal() & Padding(VALID))
    assert torch.equal(out[0, :, 0], torch.zeros(3, 5, dtype=torch.float64))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("feature", FEATURE_MAPS)
def test_one_token_at_a_time_equals_all_at_once(feature):
    q, k, v = numbers(17)
    expected = linear_attention(q, k, v, Causal(), feature=feature, chunk=5)
    state = None
    for t in range(17):
        out, state = recurrent_step(q[:, :, t], k[:, :, t], v[:, :, t], state, feature=feature)
        torch.testing.assert_close(out, expected[:, :, t], **EXACT)


def test_the_state_of_a_prompt_is_that_of_its_tokens():
    q, k, v = numbers(17)
    state = linear_state(k[:, :, :16], v[:, :, :16])
    assert state.s.shape == (2, 3, 4, 5) and state.z.shape == (2, 3, 4)  # however long the prompt
    out, _ = recurrent_step(q[:, :, 16], k[:, :, 16], v[:, :, 16], state)
    torch.testing.assert_close(out, linear_attention(q, k, v, Causal())[:, :, 16], **EXACT)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_layer_equals_the_pairs_and_decodes(bias):
    torch.manual_seed(2)
    layer = LinearAttention(6, 2, 4, bias=bias, chunk=3).double()
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.6)
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    heads = [
        by_pairs(*(p(x)[..., h * 4 : h * 4 + 4][:, None] for p in (layer.q_proj, layer.k_proj, layer.v_proj)), Causal())
        for h in range(2)
    ]
    expected = layer.o_proj(torch.cat(heads, -1)[:, 0])
    torch.testing.assert_close(layer(x, Causal()), expected, **EXACT)
    state = None
    for t in range(8):
        out, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(out, expected[:, t : t + 1], **EXACT)


def test_sums_are_fp32_in_bf16():
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 1, 2000, 8).bfloat16() for _ in range(3))
    out = linear_attention(q, k, v, Causal())
    expected = linear_attention(q.double(), k.double(), v.double(), Causal())
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_memory_grows_with_the_length_alone():
    """No tensor of all pairs: the largest that autograd keeps is a few times the input."""
    sizes = []

    def note(x):
        sizes.append(x.numel())
        return x

    q, k, v = (torch.randn(1, 1, 4096, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        linear_attention(q, k, v, Causal() & SameDocument(torch.zeros(1, 4096, dtype=torch.int64)))
    assert max(sizes) <= 4096 * 8


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Window(4), "Window"),
        (Causal() & Window(4), "Window"),
        (Causal() | Padding(VALID), r"Causal\(\) \| Padding"),
        (SameDocument(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0]])), "row 1"),
        (Padding(VALID[:, :5]), "5 tokens"),
    ],
)
def test_masks_that_need_each_pair_are_refused_by_name(mask, words):
    with pytest.raises(HanlinError, match=words):
        linear_attention(*numbers(), mask)


def test_an_unknown_feature_map_is_refused():
    with pytest.raises(HanlinError, match=r"favor.*elu\+1"):
        LinearAttention(4, 1, 4, feature="favor")
