"""The engine in fp32 and bf16, as users run it, over a frozen model: with the CPU kernels or without, it keeps its
promises (the other tests run in fp64, which the kernels leave to torch)."""

import pytest
import torch
from tests.engine.paging import Book

from hanlin.engine import Engine, SamplingParams
from hanlin.kernels.library import library
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.frozen import freeze

PROMPTS = [[5, 9, 11], [7], list(range(20, 57)), [3, 1, 4, 1, 5, 9, 2, 6], [5, 9, 12]]


def make_model(dtype: torch.dtype, window: int | None, size: int) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "qwen3",
        depth=3,
        attention=AttentionConfig(heads=6, kv_heads=2, head_dim=24, qk_norm=True, window=window),
        feed_forward=FeedForwardConfig(112),
        vocab_size=size,
        width=72,
        max_positions=256,
    )
    model = Transformer(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model = model.to(dtype)
    freeze(model)
    return model


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(library() is None, reason="torch's own operations round differently in batches of other sizes")
def test_a_sequence_is_the_same_to_the_last_bit_in_any_batch(tokenizer, dtype, window):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
    model = make_model(dtype, window, tokenizer.size)
    with Engine(model, tokenizer, max_batch=5) as engine:
        together = engine.generate(PROMPTS, params)
        for prompt, completion in zip(PROMPTS, together, strict=True):
            alone = engine.generate(prompt, params)[0]
            assert alone.token_ids == completion.token_ids
            assert alone.logprobs == completion.logprobs


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_token_by_token_equals_the_whole(tokenizer, dtype, tolerance, window):
    model = make_model(dtype, window, tokenizer.size)
    ids = torch.randint(0, tokenizer.size, (2, 30))
    cache = Book(model.config, sequences=2, length=30, dtype=dtype)
    parts = [model(part, cache=cache.step([0, 1], 1)).logits for part in ids.split(1, dim=1)]
    whole = model(ids).logits
    error = (torch.cat(parts, 1) - whole).abs().max() / whole.std()
    assert error < tolerance
