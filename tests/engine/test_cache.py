"""A cached forward equals the uncached one, however the tokens are cut into steps and rows."""

import pytest
import torch

from hanlin.engine.cache import ContiguousCache
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer


@pytest.fixture(params=[None, 5], ids=["full", "window"])
def model(request) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "llama",
        depth=3,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, qk_norm=True, window=request.param),
        feed_forward=FeedForwardConfig(48),
        vocab_size=61,
        width=32,
    )
    model = Transformer(config).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 1, 1, 11], [19, 1]])
def test_steps_equal_the_whole(model, cuts):
    ids = torch.randint(0, 61, (1, 20))
    cache = ContiguousCache(model.config, slots=2, capacity=20, dtype=torch.float64)
    parts = [model(part, cache=cache.step([0], part.shape[1])).logits for part in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_rows_of_unequal_length_decode_together(model):
    prompts = [torch.randint(0, 61, (1, n)) for n in (3, 9, 1)]
    cache = ContiguousCache(model.config, slots=4, capacity=16, dtype=torch.float64)
    for slot, prompt in enumerate(prompts):
        model(prompt, cache=cache.step([slot], prompt.shape[1]), logits=None)
    new = torch.randint(0, 61, (3, 1))
    together = model(new, cache=cache.step([0, 1, 2], 1)).logits
    for slot, prompt in enumerate(prompts):
        alone = model(torch.cat([prompt, new[slot : slot + 1]], 1), logits="last").logits
        torch.testing.assert_close(together[slot : slot + 1], alone, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_move_and_truncate_leave_the_other_sequences_alone(model):
    a, b = torch.randint(0, 61, (1, 6)), torch.randint(0, 61, (1, 4))
    cache = ContiguousCache(model.config, slots=2, capacity=12, dtype=torch.float64)
    model(a, cache=cache.step([0], 6))
    model(b, cache=cache.step([1], 4))
    cache.truncate(0, 0)
    cache.move(1, 0)
    new = torch.randint(0, 61, (1, 1))
    got = model(new, cache=cache.step([0], 1)).logits
    torch.testing.assert_close(got, model(torch.cat([b, new], 1), logits="last").logits, rtol=0, atol=1e-12)
