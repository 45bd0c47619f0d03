"""A balanced config of a wanted size: depth and width that fit each other, in the proportions of a family.

Width per layer grows slowly with size (SmolLM 135M: 19, Qwen3 0.6B: 36, Llama 3 8B: 128); the search takes the pair
nearest to the wanted number of parameters, and among near ones the best proportioned.
"""

import math
from dataclasses import replace

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.families import find_family

VOCABULARY = {"llama": 128_256, "qwen2": 151_936, "qwen3": 151_936, "mistral": 32_768}
HIDDEN = {"qwen3": 3.0}  # widths of a feed-forward, where not 8/3
BASE = {"qwen2": 1_000_000.0, "qwen3": 1_000_000.0, "mistral": 1_000_000.0}  # of rotary positions, where not 500,000
WIDTHS = tuple(64 * n for n in (*range(1, 17), *range(18, 33, 2), *range(36, 65, 4), *range(72, 257, 8)))


def balanced_config(
    family: str, parameters: float, *, vocab_size: int | None = None, max_positions: int = 4096
) -> ModelConfig:
    """The config of `family` nearest to so many parameters. `HanlinError` where the vocabulary alone is larger."""
    vocab = vocab_size or VOCABULARY[family]
    ideal = 12 * max(parameters / 1e6, 0.1) ** 0.23  # width for each layer
    best: tuple[float, ModelConfig] | None = None
    for width in WIDTHS:
        one = layered(family, width, 1, vocab, max_positions, tied=parameters < 3e9)
        base = one.parameters().total
        step = replace(one, layers=one.layers * 2).parameters().total - base
        depth = max(1, round((parameters - base) / step) + 1)
        total = base + step * (depth - 1)
        cost = 4 * abs(math.log(total / parameters)) + 0.5 * abs(math.log(width / depth / ideal))
        if best is None or cost < best[0]:
            best = cost, replace(one, layers=one.layers * depth)
    assert best is not None
    found = best[1].parameters().total
    if not 0.8 * parameters <= found <= 1.25 * parameters:
        raise HanlinError(
            f"No {family} of {parameters / 1e6:,.1f}M parameters with a vocabulary of {vocab:,}: the nearest has "
            f"{found / 1e6:,.1f}M. Take a smaller vocabulary (--vocab-size, --tokenizer) or more parameters."
        )
    return best[1]


def layered(family: str, width: int, depth: int, vocab: int, max_positions: int, *, tied: bool) -> ModelConfig:
    """Heads of 64 (128 from width 2,048 on), a quarter as many key heads, a feed-forward of 8/3 or 3 widths."""
    head = 128 if width >= 2048 else 64
    heads = width // head
    kv_heads = next(k for k in (max(1, heads // 4), max(1, heads // 3), max(1, heads // 2), heads) if heads % k == 0)
    hidden = 64 * max(1, round(width * HIDDEN.get(family, 8 / 3) / 64))
    traits = find_family(family, "--like").attention_traits()
    attention = AttentionConfig(heads, kv_heads, head, **traits)
    return ModelConfig.uniform(
        family, depth=depth, attention=attention, feed_forward=FeedForwardConfig(hidden), vocab_size=vocab, width=width,
        max_positions=max_positions, rope_theta=BASE.get(family, 500_000.0),
        tied_embeddings=tied,
    )  # fmt: skip
