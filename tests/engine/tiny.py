"""Random tiny models in fp64, whose logits spread so widely that rounding decides nothing, and the slow truth."""

import torch

from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.tokens import Tokenizer


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


@torch.inference_mode()
def greedy_uncached(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The slow truth: no cache, no batch, the whole sequence through the model for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), logits="last").logits[0, -1].argmax()))
    return ids[len(prompt) :]
