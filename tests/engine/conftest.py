"""A real byte-level tokenizer of a few hundred tokens and random tiny models whose logits spread widely enough that
rounding decides nothing."""

import pytest
import torch

from hanlin.engine import Engine
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.tokens import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过懒狗。世界你好！ def f(x): return x + 1\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator([TEXT * 20] * 5, vocab_size=330)


def make_model(tokenizer: Tokenizer, *, window: int | None = None, positions: int = 256) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "qwen3",
        depth=2,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, qk_norm=True, window=window),
        feed_forward=FeedForwardConfig(48),
        vocab_size=tokenizer.size,
        width=32,
        max_positions=positions,
    )
    model = Transformer(config).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="session")
def model(tokenizer) -> Transformer:
    return make_model(tokenizer)


@pytest.fixture
def engine(model, tokenizer):
    with Engine(model, tokenizer, max_batch=4) as engine:
        yield engine


@torch.inference_mode()
def greedy_uncached(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The slow truth: the whole sequence through the model for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), logits="last").logits[0, -1].argmax()))
    return ids[len(prompt) :]
