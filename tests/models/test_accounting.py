"""What a config says it costs is what the built model costs."""

from dataclasses import replace

import pytest
import torch
from tests.engine.paging import Book
from tests.models.cases import all_cases, inputs_of, reference_model
from tests.models.ours import load_ours, run_ours
from torch.utils.flop_counter import FlopCounterMode

import hanlin.nn.attention as attention_file
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer
from hanlin.models.accounting import count_flops, visible_pairs
from hanlin.models.config import ExpertsConfig, LayerConfig
from hanlin.nn.attention import plain_attention
from hanlin.nn.masks import Bidirectional, Causal, Chunk, Dilated, Window
from hanlin.nn.routing import RouterConfig

CASES = {case.name: case for case in all_cases()}


@pytest.fixture(scope="module", params=CASES)
def ours(request, tmp_path_factory) -> tuple:
    case = CASES[request.param]
    return case, load_ours(case, reference_model(case), tmp_path_factory.mktemp("model"))


def test_parameters_are_those_of_the_built_model(ours):
    _, model = ours
    counted = model.config.parameters()
    assert counted.total == model.parameter_count(), counted.parts
    every = model.config.layers + model.config.encoder
    experts = [layer for layer in every if isinstance(layer.feed_forward, ExpertsConfig)]
    assert (counted.active < counted.total) == bool(experts)


def test_cache_bytes_are_those_of_the_cache(ours):
    _, model = ours
    cache = Book(model.config, sequences=1, length=8, dtype=torch.float32).cache
    held = sum(cache.page_bytes(group) for group in range(len(cache.groups)))
    assert model.config.kv_bytes_per_token(4) == held / cache.page


def test_flops_are_those_that_torch_counts(ours, monkeypatch):
    """With the whole matrix of scores and no grouped products, which torch does not count."""
    case, model = ours
    if any(isinstance(p.feed_forward, ExpertsConfig) for p in model.config.layers + model.config.encoder):
        pytest.skip("torch counts no grouped products; experts are counted by hand below")

    def plain(q, k, v, scores, mask):
        return plain_attention(q, k, v, scores, None)

    monkeypatch.setattr(attention_file, "attend", plain)
    inputs = inputs_of(case)
    source = None if inputs.source is None else inputs.source.shape[1]
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = run_ours(case, model, inputs)
        forward = counter.get_total_flops()
        (found.hidden if found.logits is None else found.logits).sum().backward()
    expected = count_flops(model.config, *inputs.ids.shape, source=source, pairs="all")
    assert forward == pytest.approx(expected.forward, rel=0.01)
    assert counter.get_total_flops() == pytest.approx(expected.training, rel=0.01)


@pytest.mark.parametrize(
    "mask",
    [Causal(), Bidirectional(), *(Causal() & part for part in (Window(5), Window(99), Chunk(4), Dilated(3)))],
    ids=str,
)
def test_pairs_are_counted_one_by_one(mask):
    for length in (1, 6, 17):
        index = torch.arange(length)
        assert visible_pairs(mask, length) == int(mask.dense(index, index).expand(1, length, length).sum())


def test_windows_and_experts_are_counted_by_hand():
    attention = AttentionConfig(4, 2, 8, window=6)
    dense, experts = FeedForwardConfig(48), ExpertsConfig(8, 16, RouterConfig(top_k=2), shared_hidden=24)
    config = ModelConfig("llama", 61, 32, (LayerConfig(attention, dense), LayerConfig(attention, experts)))
    batch, length = 3, 20
    projections = 2 * batch * length * 32 * (32 + 16 + 16 + 32)
    pairs = sum(min(i + 1, 6) for i in range(length))
    scores = 4 * batch * 4 * 8 * pairs
    routed = 2 * batch * length * 2 * 3 * 32 * 16
    expected = {
        "attention": 2 * (projections + scores),
        "feed-forward": 2 * batch * length * 3 * 32 * 48,
        "experts": routed + 2 * batch * length * 3 * 32 * 24,
        "router": 2 * batch * length * 32 * 8,
        "head": 2 * batch * length * 32 * 61,
    }
    flops = config.flops(batch, length)
    assert flops.parts == expected
    assert flops.training == 3 * sum(expected.values()) == flops.forward + flops.backward


def test_modules_that_predict_ahead_are_counted():
    config = ModelConfig.uniform(
        "llama", depth=2, attention=AttentionConfig(4, 2, 8), feed_forward=FeedForwardConfig(48), vocab_size=61,
        width=32,
    )  # fmt: skip
    config = replace(config, predict_ahead=2)
    assert config.parameters().total == Transformer(config).parameter_count()
