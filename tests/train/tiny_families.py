"""One small model of each kind that pretraining has objectives for, every weight redrawn so that none is forgotten."""

import torch

from hanlin.models.config import (
    AttentionConfig,
    BucketPosition,
    EmbeddingConfig,
    FeedForwardConfig,
    HeadConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
    RelativeAttentionConfig,
)
from hanlin.models.transformer import Transformer
from hanlin.nn.heads import NextSentence
from hanlin.nn.rope import Rope

WIDTH = 32
HEADS = {"heads": 4, "kv_heads": 4, "head_dim": 8}


def decoder(vocabulary: int) -> Transformer:
    """Llama's kind."""
    attention = AttentionConfig(**HEADS, position=Rope())
    return build(
        ModelConfig("llama", vocabulary, WIDTH, (LayerConfig(attention, FeedForwardConfig(64)),) * 2, init_std=0.1)
    )


def bert(vocabulary: int, *, pairs: bool = False) -> Transformer:
    """Learnt positions, segments, post-norm, a head with transform and bias, tied embeddings."""
    attention = AttentionConfig(**HEADS, qkv_bias=True, output_bias=True, bidirectional=True, position=None)
    layer = LayerConfig(attention, FeedForwardConfig(64, True, "gelu", gated=False), norms="post")
    config = ModelConfig(
        "bert", vocabulary, WIDTH, (layer,) * 2, max_positions=64, norm=NormConfig("layer", final=False),
        embedding=EmbeddingConfig("learned", segments=2, norm=True), head=HeadConfig(bias=True, transform="gelu"),
        tied_embeddings=True, init_std=0.1,
    )  # fmt: skip
    model = Transformer(config)
    if pairs:
        model.add_module("next_sentence", NextSentence(WIDTH))
    return redraw(model)


def t5(vocabulary: int) -> Transformer:
    """Relative buckets, pre-norm, a bare ReLU feed-forward, tied embeddings scaled at the output."""

    def layers(both_ways: bool) -> tuple[LayerConfig, ...]:
        a = AttentionConfig(**HEADS, bidirectional=both_ways, position=BucketPosition(8, 20), scale=1.0)
        cross = None if both_ways else AttentionConfig(**HEADS, bidirectional=True, position=None, scale=1.0)
        return (LayerConfig(a, FeedForwardConfig(64, activation="relu", gated=False), cross),) * 2

    head = HeadConfig(input_scale=WIDTH**-0.5)
    return build(
        ModelConfig("t5", vocabulary, WIDTH, layers(False), layers(True), head=head, tied_embeddings=True, init_std=0.3)
    )


def bart(vocabulary: int) -> Transformer:
    """Learnt positions, post-norm, GELU, a bias at the output."""

    def layers(both_ways: bool) -> tuple[LayerConfig, ...]:
        biased = {"qkv_bias": True, "output_bias": True, "position": None}
        a = AttentionConfig(**HEADS, **biased, bidirectional=both_ways)
        cross = None if both_ways else AttentionConfig(**HEADS, **biased, bidirectional=True)
        return (LayerConfig(a, FeedForwardConfig(64, True, "gelu", gated=False), cross, norms="post"),) * 2

    return build(
        ModelConfig(
            "bart", vocabulary, WIDTH, layers(False), layers(True), max_positions=64,
            norm=NormConfig("layer", final=False), embedding=EmbeddingConfig("learned", offset=2, norm=True),
            head=HeadConfig(bias=True), tied_embeddings=True, init_std=0.1,
        )
    )  # fmt: skip


def xlnet(vocabulary: int) -> Transformer:
    """Relative attention with two streams, post-norm, a bias at the output."""
    layer = LayerConfig(RelativeAttentionConfig(4, 8), FeedForwardConfig(64, True, "gelu", gated=False), norms="post")
    return build(
        ModelConfig(
            "xlnet", vocabulary, WIDTH, (layer,) * 2, norm=NormConfig("layer", final=False), head=HeadConfig(bias=True),
            tied_embeddings=True, init_std=0.1,
        )
    )  # fmt: skip


def build(config: ModelConfig) -> Transformer:
    return redraw(Transformer(config))


def redraw(model: Transformer) -> Transformer:
    """The same weights at every call, vectors away from 0 and 1: a forgotten bias or norm would show."""
    generator = torch.Generator().manual_seed(0)
    std = model.config.init_std
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data.round() + drawn * 0.1 if parameter.ndim < 2 else drawn * std
    return model
