"""Latent attention against transformers' DeepSeek modules, against a loop, and its two forms against each other."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

import hanlin.nn.attention as attention_file
from hanlin.nn.attention import Scores
from hanlin.nn.frozen import freeze
from hanlin.nn.latent_attention import LatentAttention
from hanlin.nn.masks import Causal, Mask, SameDocument, lower
from hanlin.nn.rope import Rope

WIDTH, HEADS, RANK, NOPE, ROPE, VALUE = 24, 4, 12, 6, 4, 10
Q_RANKS = pytest.mark.parametrize("q_rank", [None, 7])
THETA = 100.0


class LatentCache:
    """Keeps what it is handed and attends by the definition, one query at a time."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.read = 0
        self.new = 0

    def step(self, new: int) -> "LatentCache":
        self.read, self.new = self.read + self.new, new
        return self

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.read, self.read + self.new)[None]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores, *, value_dim: int | None = None
    ) -> Tensor:
        assert v is None and k.shape[2] == 1
        keys = self.keys[layer] = torch.cat([self.keys[layer], k], 1) if layer in self.keys else k
        out = torch.empty(*q.shape[:3], value_dim or 0, dtype=q.dtype)
        for t in range(q.shape[1]):
            seen = keys[:, : self.read + t + 1, 0]
            weights = (torch.einsum("rhd,rsd->rhs", q[:, t], seen) * scores.scale).softmax(-1)
            out[:, t] = weights @ seen[..., :value_dim]
        return out


def build(q_rank: int | None = None, **settings: Any) -> LatentAttention:
    torch.manual_seed(0)
    layer = LatentAttention(WIDTH, HEADS, RANK, NOPE, ROPE, VALUE, q_rank=q_rank, **settings).double()
    redraw(layer)
    return layer


def redraw(module: nn.Module) -> None:
    """Norms 1 ± 0.1, everything else so large that the softmax is not flat."""
    for name, parameter in module.named_parameters():
        parameter.data.normal_(1.0 if "layernorm" in name else 0.0, 0.1 if "layernorm" in name else 0.5)


def tables(length: int, *, interleaved: bool = True, dtype: torch.dtype = torch.float64, start: int = 0):
    rope = Rope(theta=THETA, interleaved=interleaved)
    return rope.tables(torch.arange(start, start + length)[None], ROPE, dtype, longest=4096)


def causal(length: int, dtype: torch.dtype = torch.float64):
    return lower(Causal(), length, dtype=dtype, device=torch.device("cpu"))


class WideNorm(nn.Module):
    """The oracle's norm computes in fp32; the same formula in fp64."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def oracle(version: int, q_rank: int | None, **settings: Any) -> Any:
    """The attention module of transformers in fp64."""
    kind: Any = DeepseekV2Config if version == 2 else DeepseekV3Config
    config = kind(
        hidden_size=WIDTH, num_attention_heads=HEADS, kv_lora_rank=RANK, q_lora_rank=q_rank, qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE, v_head_dim=VALUE, max_position_embeddings=64, **settings,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    module: Any = (v2.DeepseekV2Attention if version == 2 else v3.DeepseekV3Attention)(config, 0).double()
    redraw(module)
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if getattr(module, name) is not None:
            setattr(module, name, WideNorm(getattr(module, name)))
    return module


def angles_of(version: int, length: int) -> Any:
    """What transformers hands a layer: cos and sin of the angles twice (V3), or complex numbers (V2)."""
    frequencies = 1 / torch.tensor(THETA) ** (torch.arange(0, ROPE, 2) / ROPE)  # fp32, as in a model's buffer
    angles = torch.arange(length, dtype=torch.float64)[None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.complex(cos, sin) if version == 2 else (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))


YARN = {
    "rope_type": "yarn", "rope_theta": THETA, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
CASES: dict[str, tuple[int, int | None, dict[str, Any]]] = {
    "V2": (2, None, {}),
    "V2, queries with a latent, biases": (2, 7, {"attention_bias": True}),
    "V3": (3, 7, {}),
    "V3, biases": (3, 7, {"attention_bias": True}),
    "V3, queries without a latent, biases": (3, None, {"attention_bias": True}),
    "V3, pairs as halves": (3, 7, {"rope_interleave": False}),
    "V3, the scale of YaRN": (3, 7, {"rope_parameters": YARN}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_equals_transformers(case, monkeypatch):
    version, q_rank, settings = CASES[case]
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else x.to(torch.float32))
    theirs = oracle(version, q_rank, **settings)
    scale = None
    if "rope_parameters" in settings:
        scale = (NOPE + ROPE) ** -0.5 * (0.1 * 0.7 * math.log(8.0) + 1) ** 2
        assert theirs.scaling == pytest.approx(scale)
    ours = build(q_rank, bias=settings.get("attention_bias", False), scale=scale)
    ours.load_state_dict(theirs.state_dict())

    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    hidden = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x, position_embeddings=angles_of(version, 9), attention_mask=hidden)[0]
    out = ours(x, tables(9, interleaved=settings.get("rope_interleave", True)), causal(9), None)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    direction = torch.randn_like(out)
    names = sorted(dict(ours.named_parameters()))
    for name, a, b in zip(
        ["x", *names],
        torch.autograd.grad(out, [x, *(ours.get_parameter(n) for n in names)], direction),
        torch.autograd.grad(expected, [x, *(theirs.get_parameter(n) for n in names)], direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def by_loops(layer: LatentAttention, x: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
    """Equations 37 to 47 of the paper, one head and one query at a time; visible (rows, T, T) bool."""

    def turn(vector: Tensor, t: int) -> Tensor:  # pairs (2i, 2i + 1)
        out = torch.empty_like(vector)
        for i in range(ROPE // 2):
            angle = t * float(1 / torch.tensor(THETA) ** (2 * i / ROPE))  # the frequency is fp32
            cos, sin = math.cos(angle), math.sin(angle)
            a, b = vector[2 * i], vector[2 * i + 1]
            out[2 * i], out[2 * i + 1] = a * cos - b * sin, a * sin + b * cos
        return out

    def norm(vector: Tensor, weight: Tensor) -> Tensor:
        return vector / (vector.square().mean() + 1e-6).sqrt() * weight

    result = torch.empty(*x.shape[:2], WIDTH, dtype=x.dtype)
    up = layer.kv_b_proj.weight.view(HEADS, NOPE + VALUE, RANK)
    for r in range(len(x)):
        down = [layer.kv_a_proj_with_mqa.weight @ token for token in x[r]]
        latent = [norm(d[:RANK], layer.kv_a_layernorm.weight) for d in down]
        shared = [turn(d[RANK:], t) for t, d in enumerate(down)]
        for t in range(x.shape[1]):
            q = layer.q_b_proj.weight @ norm(layer.q_a_proj.weight @ x[r, t], layer.q_a_layernorm.weight)
            heads = []
            for h, query in enumerate(q.view(HEADS, NOPE + ROPE)):
                query = torch.cat([query[:NOPE], turn(query[NOPE:], t)])
                seen = [s for s in range(x.shape[1]) if visible[r, t, s]]
                keys = [torch.cat([up[h, :NOPE] @ latent[s], shared[s]]) for s in seen]
                weights = torch.stack([query @ k / math.sqrt(NOPE + ROPE) for k in keys]).softmax(0)
                heads.append(sum(w * (up[h, NOPE:] @ latent[s]) for w, s in zip(weights, seen, strict=True)))
            result[r, t] = layer.o_proj.weight @ torch.cat(heads)
    return result


MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "documents": Causal() & SameDocument(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])),
}


@pytest.mark.parametrize("fused", [True, False], ids=["blocks", "SDPA"])
@pytest.mark.parametrize("name", MASKS)
def test_a_layer_equals_explicit_loops(name, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(attention_file, "worth_it", lambda q: False)
    layer, index = build(7), torch.arange(6)
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    visible = MASKS[name].dense(index, index).expand(2, -1, -1)
    out = layer(x, tables(6), lower(MASKS[name], 6, dtype=x.dtype, device=x.device), None)
    with torch.no_grad():
        expected = by_loops(layer, x, tables(6), visible)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@Q_RANKS
@pytest.mark.parametrize("interleaved", [True, False])
def test_the_absorbed_form_equals_the_expanded_one(q_rank, interleaved):
    layer = build(q_rank)
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    rope = tables(8, interleaved=interleaved)
    expanded, absorbed = layer(x, rope, causal(8), None), layer(x, rope, None, LatentCache().step(8))
    torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-10)


@Q_RANKS
@pytest.mark.parametrize("steps", [[1] * 8, [5, 1, 1, 1], [3, 4, 1]])
def test_cached_equals_uncached(q_rank, steps):
    layer, cache = build(q_rank), LatentCache()
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    expected = layer(x, tables(8), causal(8), None)
    parts = []
    for new, part in zip(steps, x.split(steps, dim=1), strict=True):
        step = cache.step(new)
        parts.append(layer(part, tables(new, start=int(step.positions[0, 0])), None, step))
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_token_leaves_its_latent_and_one_turned_key_in_the_cache(dtype):
    layer, cache = build(7), LatentCache()
    layer(torch.randn(1, 5, WIDTH, dtype=dtype), tables(5, dtype=dtype), None, cache.step(5))
    (kept,) = cache.keys.values()
    assert kept.dtype == dtype
    assert kept.nbytes == 5 * (RANK + ROPE) * dtype.itemsize


@pytest.mark.parametrize("cached", [True, False])
def test_activations_may_be_narrower_than_the_weights(cached):
    layer = build(7).float()
    x = torch.randn(1, 6, WIDTH)
    expected = layer(x, tables(6, dtype=torch.float32), causal(6, torch.float32), None)
    rope, low = tables(6, dtype=torch.bfloat16), x.bfloat16()
    out = layer(low, rope, None if cached else causal(6, torch.bfloat16), LatentCache().step(6) if cached else None)
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() <= 0.03 * expected.norm()


def test_a_frozen_layer_gives_the_same_numbers():
    """Freezing takes the plain weights away, but the absorbed form reads one."""
    layer = build(7).float().requires_grad_(False)
    x, rope = torch.randn(1, 6, WIDTH), tables(6, dtype=torch.float32)
    expected = layer(x, rope, None, LatentCache().step(6)), layer(x, rope, causal(6, torch.float32), None)
    if not freeze(layer):
        pytest.skip("this machine cannot freeze")
    found = layer(x, rope, None, LatentCache().step(6)), layer(x, rope, causal(6, torch.float32), None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
