"""Attention against explicit loops over rows, heads, queries and keys in fp64: values and gradients."""

import math

import pytest
import torch

import hanlin.nn.attention as attention_file
from hanlin.nn.attention import Attention, Scores, attend, attend_packed
from hanlin.nn.masks import Causal, Lowered, Mask, SameDocument, Window, lower
from hanlin.nn.norms import RMSNorm
from hanlin.nn.rope import inverse_frequencies, rope_tables

TOLERANCE = {"rtol": 0, "atol": 1e-10}
BORDERS = torch.tensor([[0] * 70 + [1] * 60 + [2] * 20, [0] * 149 + [1]])


def turn(vector: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Rotary position of one head's vector, pair by pair, from the definition."""
    half = len(vector) // 2
    out = []
    for i in range(len(vector)):
        j = i % half
        angle = position * float(inverse_frequencies(len(vector), theta)[j])
        angle = float(torch.tensor(angle, dtype=torch.float32))  # angles are fp32 in any precision
        cos, sin = (float(f(torch.tensor(angle, dtype=torch.float32))) for f in (torch.cos, torch.sin))
        partner = -vector[i + half] if i < half else vector[i - half]
        out.append(vector[i] * cos + partner * sin)
    return torch.stack(out)


def norm(vector: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return vector / (vector.square().mean() + eps).sqrt() * weight


def by_loops(layer: Attention, x: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor, theta: float):
    """visible (rows, T, T) bool. The layer, one head and one query at a time."""
    H, K, D = layer.heads, layer.kv_heads, layer.head_dim

    def project(linear, vector, head):
        part = slice(head * D, head * D + D)
        out = linear.weight[part] @ vector
        return out if linear.bias is None else out + linear.bias[part]

    rows = []
    for r in range(len(x)):
        outputs = [[] for _ in range(x.shape[1])]
        for h in range(H):
            g = h * K // H
            q, k, v = [], [], []
            for t in range(x.shape[1]):
                query, key = project(layer.q_proj, x[r, t], h), project(layer.k_proj, x[r, t], g)
                if layer.q_norm is not None:
                    query = norm(query, layer.q_norm.weight, layer.q_norm.eps)
                    key = norm(key, layer.k_norm.weight, layer.k_norm.eps)
                q.append(turn(query, int(positions[r, t]), theta))
                k.append(turn(key, int(positions[r, t]), theta))
                v.append(project(layer.v_proj, x[r, t], g))
            for t in range(x.shape[1]):
                seen = [s for s in range(x.shape[1]) if visible[r, t, s]]
                scores = torch.stack([q[t] @ k[s] / math.sqrt(D) for s in seen])
                weights = scores.softmax(0)
                outputs[t].append(sum(w * v[s] for w, s in zip(weights, seen, strict=True)))
        rows.append(torch.stack([layer.o_proj(torch.cat(heads)) for heads in outputs]))
    return torch.stack(rows)


CASES = {
    "plain": (4, 4, 6, {}, Causal()),
    "grouped, 4 to 1": (4, 1, 4, {"qkv_bias": True, "output_bias": True}, Causal()),
    "grouped, 2 to 1, norms": (4, 2, 4, {"qk_norm": RMSNorm}, Causal()),
    "window": (2, 1, 6, {"qkv_bias": True}, Causal() & Window(3)),
    "documents": (2, 2, 4, {}, Causal() & SameDocument(torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2]]))),
    "both ways": (2, 1, 4, {"qk_norm": RMSNorm}, Causal() | Window(99)),
}


@pytest.mark.parametrize("fused", [True, False], ids=["blocks", "SDPA"])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_equals_explicit_loops(case, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(attention_file, "worth_it", lambda q: False)
    heads, kv_heads, head_dim, settings, mask = CASES[case]
    torch.manual_seed(0)
    layer = Attention(10, heads, kv_heads, head_dim, **settings).double()
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5)
    x = torch.randn(2, 7, 10, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10, 11]])
    rope = rope_tables(positions, inverse_frequencies(head_dim, 100.0), torch.float64)
    index = torch.arange(7)
    visible = mask.dense(index, index).expand(2, -1, -1)
    inputs = [x, *layer.parameters()]
    out = layer(x, rope, lower(mask, 7, dtype=torch.float64, device=x.device))
    expected = by_loops(layer, x, positions, visible, 100.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)  # one rounding of the fp32 angle's product
    direction = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def softmax_attention(q, k, v, visible, scale):
    """The formula with repeated heads: (rows, heads, T, D) all, visible (rows or 1, T, L)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible[:, None], float("-inf"))
    return scores.softmax(-1) @ v


MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window": Causal() & Window(40),
    "documents": Causal() & SameDocument(BORDERS),
    "window and documents": Causal() & Window(13) & SameDocument(BORDERS),
    "all": Causal() | Window(1000),
}


@pytest.mark.parametrize("fused", [True, False], ids=["blocks", "SDPA"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("name", MASKS)
def test_long_rows_equal_the_formula(name, heads, fused, monkeypatch):
    """150 tokens are several blocks of queries, the last one short."""
    if not fused:
        monkeypatch.setattr(attention_file, "worth_it", lambda q: False)
    torch.manual_seed(1)
    H, K = heads
    q = torch.randn(2, 150, H, 8, dtype=torch.float64, requires_grad=True)  # as a layer has them: heads not in front
    k, v = (torch.randn(2, 150, K, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    index = torch.arange(150)
    mask = MASKS[name]
    turned = [t.transpose(1, 2) for t in (q, k, v)]
    out = attend(*turned, Scores(0.3, mask), lower(mask, 150, dtype=torch.float64, device=q.device))
    expected = softmax_attention(*turned, mask.dense(index, index), 0.3)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    direction = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), direction),
        torch.autograd.grad(expected, (q, k, v), direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 129])
def test_every_length_around_a_block_is_right(length):
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, heads, length, 4, dtype=torch.float64) for heads in (4, 2, 2))
    visible = torch.ones(1, length, length, dtype=torch.bool).tril()
    out = attend(q, k, v, Scores(0.5, Causal()), lower(Causal(), length, dtype=q.dtype, device=q.device))
    torch.testing.assert_close(out, softmax_attention(q, k, v, visible, 0.5), **TOLERANCE)


def test_the_gradient_of_a_sum_is_right():
    """The gradient of `.sum()` is a tensor without memory of its own."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, heads, 70, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    visible = torch.ones(1, 70, 70, dtype=torch.bool).tril()
    out = attend(q, k, v, Scores(0.5, Causal()), lower(Causal(), 70, dtype=q.dtype, device=q.device))
    found = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(softmax_attention(q, k, v, visible, 0.5).sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near(dtype):
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, heads, 130, 16) for heads in (4, 2, 2))
    visible = torch.ones(1, 130, 130, dtype=torch.bool).tril()
    expected = softmax_attention(q.double(), k.double(), v.double(), visible, 0.25)
    lowered = lower(Causal() & Window(1000), 130, dtype=dtype, device=q.device)
    out = attend(q.to(dtype), k.to(dtype), v.to(dtype), Scores(0.25, Causal()), lowered)
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_few_queries_over_many_keys_equal_the_formula(heads, length, biased):
    torch.manual_seed(5)
    H, K = heads
    q = torch.randn(2, length, H, 8, dtype=torch.float64)
    k, v = (torch.randn(2, K, 20, 8, dtype=torch.float64) for _ in range(2))
    visible = torch.ones(2, length, 20, dtype=torch.bool)
    if biased:
        visible = torch.rand(2, length, 20) < 0.6
        visible[..., 0] = True
    bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, float("-inf")) if biased else None
    out = attend_packed(q, k, v, bias, 0.3)
    expected = softmax_attention(q.transpose(1, 2), k, v, visible, 0.3).transpose(1, 2)
    torch.testing.assert_close(out, expected, **TOLERANCE)


@pytest.mark.parametrize("fused", [True, False], ids=["blocks", "SDPA"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_bias_of_each_head_is_added(fused, rows, monkeypatch):
    """ALiBi's and T5's biases differ by head, and values may be of another width than keys (MLA)."""
    if not fused:
        monkeypatch.setattr(attention_file, "worth_it", lambda q: False)
    torch.manual_seed(6)
    q, k = (torch.randn(2, heads, 70, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    v = torch.randn(2, 2, 70, 3, dtype=torch.float64, requires_grad=True)
    future = torch.full((70, 70), float("-inf"), dtype=torch.float64).triu(1)
    bias = torch.randn(rows, 4, 70, 70, dtype=torch.float64) + future
    out = attend(q, k, v, Scores(0.4, Causal()), Lowered(True, bias))
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.4 + bias
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    direction = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), direction), torch.autograd.grad(expected, (q, k, v), direction), strict=True
    ):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_soft_cap_and_sinks_equal_loops():
    torch.manual_seed(7)
    q, k, v = (torch.randn(2, heads, 9, 5, dtype=torch.float64) for heads in (4, 2, 2))
    sinks = torch.randn(4, dtype=torch.float64)
    scores = Scores(0.7, Causal(), softcap=1.5, sinks=sinks)
    out = attend(q, k, v, scores, lower(Causal(), 9, dtype=q.dtype, device=q.device))
    for row in range(2):
        for head in range(4):
            for i in range(9):
                dots = [float(q[row, head, i] @ k[row, head // 2, j]) for j in range(i + 1)]
                logits = [1.5 * math.tanh(0.7 * dot / 1.5) for dot in dots]
                total = sum(math.exp(s) for s in logits) + math.exp(float(sinks[head]))
                expected = sum(math.exp(s) / total * v[row, head // 2, j] for j, s in enumerate(logits))
                torch.testing.assert_close(out[row, head, i], expected, **TOLERANCE)
