"""Relative attention against transformers' XLNet and against loops over pairs, where each score is computed from its
distance without any shift."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import XLNetConfig, XLNetModel
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

from hanlin.core.errors import HanlinError
from hanlin.nn.masks import Bidirectional, Causal, Mask, Padding, Permutation, lower
from hanlin.nn.relative_attention import RelativeAttention, distance_table, relative_shift

WIDTH, HEADS, HEAD_DIM = 12, 3, 4
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def redraw(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        norm = "layer_norm.weight" in name
        parameter.data.normal_(1.0 if norm else 0.0, 0.1 if norm else 0.4)


def build(**choices: Any) -> RelativeAttention:
    torch.manual_seed(0)
    layer = RelativeAttention(WIDTH, HEADS, HEAD_DIM, **choices).double()
    redraw(layer)
    return layer


def table(queries: int, keys: int) -> Tensor:
    return distance_table(queries, keys, WIDTH, dtype=torch.float64)


def lowered(mask: Mask, length: int):
    return lower(mask, length, dtype=torch.float64, device=torch.device("cpu"))


def by_loops(
    layer: RelativeAttention,
    x: Tensor,
    g: Tensor,
    visible: Tensor,
    *,
    segments: Tensor | None = None,
    memory: Tensor | None = None,
    at: Tensor | None = None,
) -> Tensor:
    """Queries of g over keys of x, one pair at a time; visible (rows, T, T) bool."""
    D = layer.head_dim

    def head(linear: Any, vector: Tensor, h: int) -> Tensor:
        return linear.weight[h * D : h * D + D] @ vector

    def sinusoid(distance: int) -> Tensor:
        angles = [distance / 10_000 ** (i / WIDTH) for i in range(0, WIDTH, 2)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)

    rows = []
    for r in range(len(x)):
        before = 0 if memory is None else memory.shape[1]
        source = x[r] if memory is None else torch.cat([memory[r], x[r]])
        outputs = []
        for p in range(g.shape[1]):
            i = p if at is None else int(at[r, p])
            seen = [j for j in range(len(source)) if j < before or visible[r, i, j - before]]
            heads = []
            for h in range(layer.heads):
                q = head(layer.q_proj, g[r, p], h)
                scores = []
                for j in seen:
                    score = (q + layer.r_w_bias[h]) @ head(layer.k_proj, source[j], h)
                    score = score + (q + layer.r_r_bias[h]) @ head(layer.r_proj, sinusoid(before + i - j), h)
                    if segments is not None:
                        of_key = 0 if j < before else int(segments[r, j - before])
                        other = int(of_key != int(segments[r, i]))
                        score = score + (q + layer.r_s_bias[h]) @ layer.seg_embed[other, h]
                    scores.append(score / D**0.5)
                if not seen:
                    heads.append(torch.zeros(D, dtype=x.dtype))
                    continue
                weights = torch.stack(scores).softmax(0)
                heads.append(sum(w * head(layer.v_proj, source[j], h) for w, j in zip(weights, seen, strict=True)))
            outputs.append(layer.o_proj.weight @ torch.cat(heads))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def gradients_agree(out: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, list(inputs.values()), direction, allow_unused=True, retain_graph=True)
    right = torch.autograd.grad(expected, list(inputs.values()), direction, allow_unused=True, retain_graph=True)
    for name, a, b in zip(inputs, found, right, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.isfinite().all(), name
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


ORDER = torch.tensor([[2, 0, 3, 1, 4], [4, 3, 2, 1, 0]])
MASKS: dict[str, Mask] = {
    "all": Bidirectional(),
    "causal": Causal(),
    "permuted": Permutation(ORDER),
    "padded": Padding(torch.tensor([[True] * 5, [True] * 3 + [False] * 2])),
    "nothing to see for one": Permutation(ORDER, strict=True),
}
SEGMENTS = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 0, 2]])


@pytest.mark.parametrize("remembered", [0, 3])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_a_layer_equals_explicit_loops(name, segmented, remembered):
    layer, index = build(), torch.arange(5)
    x = random(2, 5, WIDTH).requires_grad_()
    memory = random(2, remembered, WIDTH) if remembered else None
    segments = SEGMENTS if segmented else None
    out = layer(x, table(5, 5 + remembered), lowered(MASKS[name], 5), segments=segments, memory=memory)
    visible = MASKS[name].dense(index, index).expand(2, 5, 5)
    expected = by_loops(layer, x, x, visible, segments=segments, memory=memory)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    gradients_agree(out, expected, {"x": x, **dict(layer.named_parameters())})


@pytest.mark.parametrize("remembered", [0, 2])
@pytest.mark.parametrize("at", [None, torch.tensor([[4, 0, 2], [1, 1, 0]])], ids=["everywhere", "at places"])
def test_two_streams_equal_explicit_loops(at, remembered):
    layer, index = build(), torch.arange(5)
    h, g = random(2, 5, WIDTH).requires_grad_(), random(2, 5 if at is None else 3, WIDTH).requires_grad_()
    memory = random(2, remembered, WIDTH) if remembered else None
    content, query = Permutation(ORDER), Permutation(ORDER, strict=True)
    outs = layer.two_streams(
        h, g, table(5, 5 + remembered), lowered(content, 5), lowered(query, 5),
        segments=SEGMENTS, memory=memory, at=at,
    )  # fmt: skip
    for out, asked, mask, place in zip(outs, (h, g), (content, query), (None, at), strict=True):
        visible = mask.dense(index, index)
        expected = by_loops(layer, h, asked, visible, segments=SEGMENTS, memory=memory, at=place)
        torch.testing.assert_close(out, expected, **TOLERANCE)
        gradients_agree(out, expected, {"h": h, "g": g, **dict(layer.named_parameters())})


def test_a_query_stream_does_not_know_its_own_token():
    """Neither the token at its place nor one of a later rank."""
    layer = build()
    h, g = random(1, 5, WIDTH), random(1, 5, WIDTH)
    masks = lowered(Permutation(ORDER[:1]), 5), lowered(Permutation(ORDER[:1], strict=True), 5)
    before = layer.two_streams(h, g, table(5, 5), *masks)
    changed = h.clone()
    changed[:, 0] += 1.0  # rank 2
    after = layer.two_streams(changed, g, table(5, 5), *masks)
    same = [(a == b).all(-1)[0].tolist() for a, b in zip(before, after, strict=True)]
    assert same[0] == [False, True, False, True, False]  # ranks 2, 0, 3, 1, 4
    assert same[1] == [True, True, False, True, False]


@given(queries=st.integers(1, 9), memory=st.integers(0, 9), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_the_shift_moves_each_score_to_its_distance(queries, memory, seed):
    keys = queries + memory
    scores = torch.rand(2, queries, keys + queries, generator=torch.Generator().manual_seed(seed))
    shifted = relative_shift(scores, keys)
    assert shifted.shape == (2, queries, keys)
    for i in range(queries):
        for j in range(keys):
            distance = memory + i - j
            assert torch.equal(shifted[:, i, j], scores[:, i, keys - distance])


def test_distances_can_be_clamped():
    free, clamped = table(4, 6), distance_table(4, 6, WIDTH, dtype=torch.float64, clamp=2)
    near = slice(6 - 2, 6 + 2 + 1)
    assert torch.equal(free[near], clamped[near])
    assert torch.equal(clamped[:4], free[4].expand(4, -1))
    assert torch.equal(clamped[9], free[8])


def test_remembered_text_equals_one_long_text():
    """Transformer-XL's recurrence: for one causal layer, what it read before is all that it needs."""
    layer = build(segments=False)
    x = random(2, 8, WIDTH)
    whole = layer(x, table(8, 8), lowered(Causal(), 8))
    second = layer(x[:, 5:], table(3, 8), lowered(Causal(), 3), memory=x[:, :5])
    torch.testing.assert_close(second, whole[:, 5:], rtol=0, atol=1e-10)


def test_activations_may_be_narrower_than_the_weights():
    layer = build().float()
    x = torch.randn(2, 5, WIDTH)
    expected = layer(x, table(5, 5).float(), lower(Causal(), 5, dtype=x.dtype, device=x.device), segments=SEGMENTS)
    mask = lower(Causal(), 5, dtype=torch.bfloat16, device=x.device)
    out = layer(x.bfloat16(), table(5, 5).bfloat16(), mask, segments=SEGMENTS)
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() <= 0.03 * expected.norm()


def test_what_does_not_fit_is_refused():
    layer, x = build(segments=False), random(1, 4, WIDTH)
    with pytest.raises(HanlinError, match="4 queries over 4 keys need a table of 8 distances; it has 9"):
        layer(x, table(5, 4), lowered(Causal(), 4))
    with pytest.raises(HanlinError, match="built without them"):
        layer(x, table(4, 4), lowered(Causal(), 4), segments=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(HanlinError, match="`memory`"):
        layer(x, table(4, 4), None)


# --- against transformers: its tensors are (width, heads, head_dim), its batch is the second dimension ---


def copy_attention(ours: RelativeAttention, theirs: Any) -> None:
    for name in ("q", "k", "v", "r"):
        ours.get_submodule(f"{name}_proj").weight.data.copy_(getattr(theirs, name).flatten(1).T)
    ours.o_proj.weight.data.copy_(theirs.o.flatten(1))
    for name in ("r_w_bias", "r_r_bias", "r_s_bias", "seg_embed"):
        getattr(ours, name).data.copy_(getattr(theirs, name))


def config(**choices: Any) -> XLNetConfig:
    return XLNetConfig(
        vocab_size=17, d_model=WIDTH, n_layer=2, n_head=HEADS, d_inner=20, dropout=0.0, attn_type="bi", **choices
    )


@pytest.mark.parametrize("two", [True, False], ids=["two streams", "one stream"])
def test_attention_equals_transformers(two):
    torch.manual_seed(1)
    theirs: Any = XLNetRelativeAttention(config()).double()
    redraw(theirs)
    ours = build()
    copy_attention(ours, theirs)
    h, g = random(2, 5, WIDTH).requires_grad_(), random(2, 5, WIDTH).requires_grad_()
    differ = (SEGMENTS[:, :, None] != SEGMENTS[:, None]).long()
    hidden = torch.rand(2, 5, 5) < 0.3
    hidden[..., 0] = False
    mask = lowered(Shown(~hidden), 5)
    flags = hidden.permute(1, 2, 0)[..., None].double()
    expected = theirs(
        h.transpose(0, 1), g.transpose(0, 1) if two else None, flags, flags, table(5, 5)[:, None].expand(-1, 2, -1),
        F.one_hot(differ.permute(1, 2, 0), 2).double(),
    )[: 1 + two]  # fmt: skip
    if two:
        outs = ours.two_streams(h, g, table(5, 5), mask, mask, segments=SEGMENTS)
    else:
        outs = (ours(h, table(5, 5), mask, segments=SEGMENTS),)
    norm = theirs.layer_norm
    for out, asked, right in zip(outs, (h, g), expected, strict=False):
        whole = F.layer_norm(out + asked, (WIDTH,), norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(whole, right.transpose(0, 1), **TOLERANCE)
        gradients_agree(whole, right.transpose(0, 1), {"h": h, **({"g": g} if two else {})})
    ours_grads = torch.autograd.grad(sum(out.square().sum() for out in outs), list(ours.parameters()))
    assert all(grad.abs().max() > 0 for grad in ours_grads)


class Shown(Mask):
    """Any matrix (rows, T, T) as a mask."""

    def __init__(self, shown: Tensor) -> None:
        self.shown = shown

    @property
    def rows(self) -> int:
        return len(self.shown)

    def sees(self, row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.shown[row % len(self.shown), q, k]


class SmallXLNet:
    """XLNet from this block and torch's norms and products, over the weights of transformers' model."""

    def __init__(self, theirs: Any) -> None:
        self.theirs, self.layers = theirs, []
        for layer in theirs.layer:
            ours = build()
            copy_attention(ours, layer.rel_attn)
            self.layers.append(ours)

    def finish(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = self.theirs.layer[index]
        attention_norm, ff = layer.rel_attn.layer_norm, layer.ff
        x = F.layer_norm(x + attended, (WIDTH,), attention_norm.weight, attention_norm.bias, attention_norm.eps)
        y = F.linear(F.gelu(F.linear(x, ff.layer_1.weight, ff.layer_1.bias)), ff.layer_2.weight, ff.layer_2.bias)
        return F.layer_norm(x + y, (WIDTH,), ff.layer_norm.weight, ff.layer_norm.bias, ff.layer_norm.eps)

    def one_stream(self, ids: Tensor, mask: Mask, segments: Tensor) -> Tensor:
        x, length = F.embedding(ids, self.theirs.word_embedding.weight), ids.shape[1]
        for i, layer in enumerate(self.layers):
            x = self.finish(i, x, layer(x, table(length, length), lowered(mask, length), segments=segments))
        return x

    def two_streams(self, ids: Tensor, content: Mask, query: Mask, segments: Tensor, at: Tensor) -> Tensor:
        h, length = F.embedding(ids, self.theirs.word_embedding.weight), ids.shape[1]
        g = self.theirs.mask_emb.expand(*at.shape, -1)
        masks = lowered(content, length), lowered(query, length)
        for i, layer in enumerate(self.layers):
            outs = layer.two_streams(h, g, table(length, length), *masks, segments=segments, at=at)
            h, g = self.finish(i, h, outs[0]), self.finish(i, g, outs[1])
        return g


def xlnet(monkeypatch) -> Any:
    torch.manual_seed(2)
    theirs: Any = XLNetModel(config()).double().eval()
    redraw(theirs)
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # else its distances stay fp32, whatever the weights are
    return theirs


def test_the_model_equals_transformers(monkeypatch):
    theirs = xlnet(monkeypatch)
    ids, real = torch.randint(0, 17, (2, 5)), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected = theirs(ids, attention_mask=real.double(), token_type_ids=SEGMENTS).last_hidden_state
    mask = Padding(real) | Shown(torch.eye(5, dtype=torch.bool)[None])  # there, padding still sees itself
    out = SmallXLNet(theirs).one_stream(ids, mask, SEGMENTS)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    gradients_agree(out, expected, {"embedding": theirs.word_embedding.weight})


def test_the_model_with_two_streams_equals_transformers(monkeypatch):
    theirs = xlnet(monkeypatch)
    ids, at = torch.randint(0, 17, (2, 5)), torch.tensor([[4, 2], [0, 1]])  # the last of each order, as in training
    content, query = Permutation(ORDER), Permutation(ORDER, strict=True)
    index = torch.arange(5)
    expected = theirs(
        ids, token_type_ids=SEGMENTS, perm_mask=(~query.dense(index, index)).double(),
        target_mapping=F.one_hot(at, 5).double(),
    ).last_hidden_state  # fmt: skip
    out = SmallXLNet(theirs).two_streams(ids, content, query, SEGMENTS, at)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    gradients_agree(out, expected, {"mask_emb": theirs.mask_emb, "embedding": theirs.word_embedding.weight})
