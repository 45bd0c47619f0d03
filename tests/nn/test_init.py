"""Initialisations against torch.nn.init's formulas: moments of many draws, exact bounds, and repeatability."""

import math

import pytest
import torch
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.nn import init
from hanlin.nn.feed_forward import FeedForward
from hanlin.nn.linear import Linear
from hanlin.nn.norms import LayerNorm, deepnorm_constants

SHAPES = [(300, 500), (600, 200), (40, 30, 5, 4)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_moments(x: torch.Tensor, std: float, mean: float = 0.0):
    """Within five standard errors; of a kurtosis up to the normal one, 3."""
    x = x.detach().double()
    assert abs(float(x.mean()) - mean) <= 5 * std / math.sqrt(x.numel())
    assert abs(float(x.std()) / std - 1) <= 5 * math.sqrt(0.5 / x.numel())


def assert_fills(x: torch.Tensor, bound: float):
    """A uniform draw reaches, and never passes, its bound."""
    assert float(x.abs().max()) <= bound * (1 + 1e-6)
    assert float(x.max()) > bound * (1 - 1e-3) and float(x.min()) < -bound * (1 - 1e-3)


@pytest.mark.parametrize("gain", [1.0, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_xavier(shape, gain):
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))
    std = gain * math.sqrt(2 / (fan_in + fan_out))
    assert_moments(init.xavier_normal(shape, gain=gain, generator=seeded()), std)
    flat = init.xavier_uniform(shape, gain=gain, generator=seeded())
    assert_moments(flat, std)
    assert_fills(flat, math.sqrt(3) * std)
    theirs = nn.init.xavier_uniform_(torch.empty(shape), gain=gain, generator=seeded())
    torch.testing.assert_close(flat, theirs)  # the same draws by the same bounds


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("nonlinearity", ["relu", "linear", "sigmoid", "tanh", "selu", "leaky_relu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kaiming(shape, nonlinearity, mode):
    slope = 0.2 if nonlinearity == "leaky_relu" else None
    settings = {"mode": mode, "nonlinearity": nonlinearity}
    std = nn.init.calculate_gain(nonlinearity, slope) / math.sqrt(
        nn.init._calculate_correct_fan(torch.empty(shape), mode)
    )
    assert_moments(init.kaiming_normal(shape, slope=slope, generator=seeded(), **settings), std)
    flat = init.kaiming_uniform(shape, slope=slope, generator=seeded(), **settings)
    assert_moments(flat, std)
    assert_fills(flat, math.sqrt(3) * std)
    theirs = nn.init.kaiming_uniform_(torch.empty(shape), a=slope or 0, generator=seeded(), **settings)
    torch.testing.assert_close(flat, theirs)


@pytest.mark.parametrize(("low", "high"), [(-2.0, 2.0), (-0.5, 3.0), (1.0, 2.0)])
def test_a_truncated_normal_has_the_truncated_moments(low, high):
    """Mean and variance of N(0, 1) within [low, high], in closed form."""
    x = init.truncated_normal((500, 400), 0.02, mean=5.0, low=low, high=high, generator=seeded()).double()
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    (f_low, f_high), (c_low, c_high) = (
        [float(f(torch.tensor(t, dtype=torch.float64))) for t in (low, high)]
        for f in (lambda t: normal.log_prob(t).exp(), normal.cdf)
    )
    inside = c_high - c_low
    mean = (f_low - f_high) / inside
    variance = 1 + (low * f_low - high * f_high) / inside - mean**2
    assert_moments(x, 0.02 * math.sqrt(variance), 5 + 0.02 * mean)
    assert float(x.min()) >= 5 + 0.02 * low - 1e-6 and float(x.max()) <= 5 + 0.02 * high + 1e-6
    assert float(x.max() - x.min()) > 0.02 * (high - low) * 0.97


def test_normal_and_constant():
    assert_moments(init.normal((400, 300), 0.02, mean=1.0, generator=seeded()), 0.02, 1.0)
    assert torch.equal(init.constant((2, 3), 0.25), torch.full((2, 3), 0.25))


@pytest.mark.parametrize("draw", [init.xavier_normal, init.xavier_uniform, init.kaiming_normal, init.kaiming_uniform])
def test_a_generator_repeats_and_torchs_own_is_left_alone(draw):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(draw((4, 5), generator=seeded(1)), draw((4, 5), generator=seeded(1)))
    assert not torch.equal(draw((4, 5), generator=seeded(1)), draw((4, 5), generator=seeded(2)))
    assert torch.equal(torch.get_rng_state(), before)


class Tower(nn.Module):
    """The names of a model, without its forward pass."""

    def __init__(self, layers: int, width: int = 96) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(200, width)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            layer.self_attn = nn.Module()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(layer.self_attn, name, Linear(width, width, bias=True))
            layer.mlp = FeedForward(width, 2 * width, bias=True, gated=True)
            layer.norm = LayerNorm(width)
            self.layers.append(layer)
        self.lm_head = Linear(width, 200, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        for parameter in self.parameters():
            parameter.data.fill_(7.0)


def test_gpt2_scales_what_writes_into_the_residual_stream_by_depth():
    tower = Tower(8)
    filled = init.initialise(tower, init.gpt2(0.02, 8, generator=seeded()))
    assert filled == 1 + 8 * (7 * 2 + 1)  # the embedding once, weights and biases, the norm's bias
    for name, p in tower.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(p, torch.full_like(p, 7.0))
        elif name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p))
        else:
            assert_moments(p, 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02)
    mlp = tower.layers[0].mlp  # a packed buffer stays one
    x = torch.randn(2, 96)
    torch.testing.assert_close(mlp.project(x), torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1))


def test_deepnorm_scales_all_projections_but_query_and_key():
    tower, beta = Tower(4), deepnorm_constants(0, 4).decoder_beta
    assert init.initialise(tower, init.deepnorm(beta, generator=seeded())) == 4 * 7 * 2
    for name, p in tower.named_parameters():
        if "norm" in name or "embed" in name:
            assert torch.equal(p, torch.full_like(p, 7.0))
        elif name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p))
        else:
            gain = 1.0 if "q_proj" in name or "k_proj" in name else beta
            assert_moments(p, gain * math.sqrt(2 / sum(p.shape)))


def test_stacked_experts_are_matrices_each():
    rule = init.deepnorm(0.5, generator=seeded())
    drawn = rule("layers.0.mlp.experts.down_proj", torch.empty(6, 80, 160))
    assert_moments(drawn, 0.5 * math.sqrt(2 / 240))
    assert_moments(init.gpt2(0.02, 2, generator=seeded())("mlp.experts.down_proj", torch.empty(6, 80, 160)), 0.01)


def test_known_tokens_keep_their_vectors_and_others_look_like_them():
    torch.manual_seed(4)
    vectors = torch.randn(300, 5) * torch.tensor([0.1, 1.0, 2.0, 3.0, 0.0]) + torch.tensor([1.0, -2.0, 0.0, 5.0, 4.0])
    ids = torch.randperm(20_000)[:300]
    table = init.pretrained_embedding(20_000, ids, vectors, generator=seeded())
    assert torch.equal(table[ids], vectors)
    others = torch.ones(20_000, dtype=torch.bool).index_fill_(0, ids, False)
    for dimension in range(5):
        drawn, known = table[others][:, dimension], vectors[:, dimension].double()
        if dimension == 4:
            assert torch.equal(drawn, torch.full_like(drawn, 4.0))
        else:
            assert_moments(drawn, float(known.std()), float(known.mean()))
    assert len(table[others].unique(dim=0)) == 19_700


@pytest.mark.parametrize(
    ("ids", "vectors", "words"),
    [
        ([1, 1], (2, 3), "1 differ"),
        ([1, 2], (3, 3), "one vector"),
        ([1, 9], (2, 3), "from 0 to 4"),
        ([-1, 2], (2, 3), "from 0 to 4"),
        ([1], (1, 3), "2 or more"),
    ],
)
def test_vectors_that_fit_no_vocabulary_are_refused(ids, vectors, words):
    with pytest.raises(HanlinError, match=words):
        init.pretrained_embedding(5, torch.tensor(ids), torch.ones(vectors))


def test_what_has_no_meaning_is_refused():
    with pytest.raises(HanlinError, match="two dimensions"):
        init.xavier_normal((5,))
    with pytest.raises(HanlinError, match="gelu"):
        init.kaiming_normal((5, 5), nonlinearity="gelu")
    with pytest.raises(HanlinError, match="slope"):
        init.kaiming_normal((5, 5), slope=0.1)
    with pytest.raises(HanlinError, match="fan_avg"):
        init.kaiming_std((5, 5), "fan_avg")
    with pytest.raises(HanlinError, match="low < high"):
        init.truncated_normal((5, 5), 0.02, low=2, high=-2)
    with pytest.raises(HanlinError, match="layer"):
        init.depth_scale(0)
