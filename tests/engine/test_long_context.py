"""A prompt ten times as long as the device's pages: streamed from the host, it ends in the same numbers."""

import time

import pytest
import torch

from hanlin.engine import Engine, SamplingParams
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer

TOKENS, SIZE = 50_000, 330


@pytest.fixture(scope="module")
def long_model():
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "qwen3", depth=2, attention=AttentionConfig(heads=4, kv_heads=2, head_dim=32, qk_norm=True),
        feed_forward=FeedForwardConfig(384), vocab_size=SIZE, width=128, max_positions=65_536,
    )  # fmt: skip
    model = Transformer(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    assert model.parameter_count() < 10_000_000
    return model


@pytest.mark.slow
def test_fifty_thousand_tokens_through_pages_for_five_thousand(long_model, tokenizer):
    prompt = torch.randint(0, SIZE, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=-1)
    size = long_model.config.kv_bytes_per_token(4)
    found, seconds = [], []
    for limits in ({"cache_bytes": 51_200 * size}, {"cache_bytes": 5_120 * size, "host_bytes": 51_200 * size}):
        with Engine(long_model, tokenizer, max_batch=4, step_tokens=1024, **limits) as engine:
            began = time.perf_counter()
            found += engine.generate([prompt], params)
            seconds.append(time.perf_counter() - began)
            assert engine.stats().cache_usage == 0
            pages = [pool.size for pool in engine._memory.tables.pools]
    assert pages[0] * 16 <= TOKENS // 10 + 256
    assert found[0].token_ids == found[1].token_ids
    worst = 0.0
    for whole, tiered in zip(found[0].logprobs, found[1].logprobs, strict=True):
        want = dict(whole.top)
        worst = max(worst, *(abs(want[token] - value) for token, value in tiered.top))
    print(f"\n{TOKENS:,} tokens: {seconds[0]:.1f} s untiered, {seconds[1]:.1f} s tiered, logprobs within {worst:.1e}")
    assert worst < 1e-4
