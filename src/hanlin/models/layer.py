"""A layer and a stack of layers, assembled from the blocks of `nn` as a `LayerConfig` says."""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from hanlin.models.config import (
    AlibiPosition,
    AttentionConfig,
    BucketPosition,
    ExpertsConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    LogN,
    ModelConfig,
    QueryTemperature,
    RelativeAttentionConfig,
)
from hanlin.models.shared import Shared
from hanlin.nn.attention import Attention, CrossAttention, PositionBias, QueryScale
from hanlin.nn.dual_chunk import log_n_scale
from hanlin.nn.experts import MixtureOfExperts
from hanlin.nn.feed_forward import FeedForward
from hanlin.nn.latent_attention import LatentAttention
from hanlin.nn.norms import build_norm
from hanlin.nn.position_bias import Alibi, RelativeBias
from hanlin.nn.positions import LearnedPositions, SinusoidalPositions
from hanlin.nn.query_scales import temperature_scale
from hanlin.nn.relative_attention import RelativeAttention


class Layer(nn.Module):
    """Attention, cross-attention where there is an encoder, and feed-forward, each with its norms (`LayerConfig`)."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int, bias: PositionBias | None) -> None:
        super().__init__()
        self.config, self.index = layer, index
        self._bias = (bias,)  # in a tuple: the stack owns it, and a module here would be saved once a layer
        norm = partial(build_model_norm, config)
        pre, sandwich = layer.norms == "pre", layer.norms == "sandwich"
        self.self_attn = build_mixer(config, layer, index, bias)
        self.input_layernorm = norm() if pre or sandwich else None
        self.post_attention_layernorm = norm()  # pre: in front of the feed-forward
        self.cross_attn = None
        if (c := layer.cross_attention) is not None:
            self.cross_attn = CrossAttention(
                config.width, c.heads, c.kv_heads, c.head_dim,
                qkv_bias=c.qkv_bias, output_bias=c.output_bias, scale=c.scale,
            )  # fmt: skip
            self.cross_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm() if sandwich else None
        self.post_feedforward_layernorm = None if pre else norm()
        self.mlp = build_feed_forward(config, layer.feed_forward)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """x (rows, T, width) -> like x."""
        h = x if self.input_layernorm is None else self.input_layernorm(x)
        y = self._mix(h, shared)
        pre = self.config.norms == "pre"
        x = self._join(x, h, y, None if pre else self.post_attention_layernorm)
        if self.cross_attn is not None:
            h = self.cross_attention_layernorm(x) if pre else x
            y = self._read_source(self.cross_attn, h, shared)
            x = self._join(x, h, y, None if pre else self.cross_attention_layernorm)
        before = self.post_attention_layernorm if pre else self.pre_feedforward_layernorm
        h = x if before is None else before(x)
        y = self.mlp(h, shared.routing) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(h)
        return self._join(x, h, y, self.post_feedforward_layernorm)

    def after_mixing(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows attention in a post-norm layer without cross-attention: x went in, y came out."""
        x = self._join(x, x, y, self.post_attention_layernorm)
        return self._join(x, x, self.mlp(x), self.post_feedforward_layernorm)

    def _mix(self, h: Tensor, shared: Shared) -> Tensor:
        """The tokens see each other."""
        a = self.config.attention
        mask = shared.lowered(a, self._bias[0])
        if isinstance(a, RelativeAttentionConfig):
            return self.self_attn(h, shared.distances(h.shape[-1]), mask, shared.cache, segments=shared.segments)
        if isinstance(a, AttentionConfig) and a.query_scaling is not None:
            return self.self_attn(h, shared.rope(a), mask, shared.cache, shared.positions)
        return self.self_attn(h, shared.rope(a), mask, shared.cache)

    def _read_source(self, cross: CrossAttention, h: Tensor, shared: Shared) -> Tensor:
        """What the encoder read, now or kept by the cache."""
        if shared.source is not None:
            return cross(h, shared.source, shared.reads)
        assert shared.cache is not None and shared.cache.source is not None
        return cross.read(h, shared.cache.source, self.index)

    def _join(self, x: Tensor, h: Tensor, y: Tensor, after: nn.Module | None) -> Tensor:
        """The residual sum of what went in (x, its norm h) and what came out (y)."""
        c = self.config
        if c.norms == "sandwich" and after is not None:
            y = after(y)
        base = h if c.residual_from_norm else x
        out = base + y if c.residual_scale == 1 else torch.add(y, base, alpha=c.residual_scale)
        return after(out) if c.norms == "post" and after is not None else out


class Stack(nn.Module):
    """What is added to the token vectors, the layers and the last norm: what the Hugging Face names put under `model.`

    embeds: whether it owns the token vectors (an encoder shares those of its decoder).
    """

    def __init__(self, config: ModelConfig, layers: tuple[LayerConfig, ...], *, embeds: bool = True) -> None:
        super().__init__()
        e, width = config.embedding, config.width
        self.scale = e.scale
        if embeds:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_positions: nn.Module | None = None
        relative = any(isinstance(layer.attention, RelativeAttentionConfig) for layer in layers)
        # where the second stream begins
        self.query_embed = nn.Parameter(torch.zeros(1, 1, width)) if relative else None
        if e.positions == "learned":
            self.embed_positions = LearnedPositions(config.max_positions, width, offset=e.offset)
        elif e.positions == "sinusoidal":
            self.embed_positions = SinusoidalPositions(config.max_positions, width, layout=e.sinusoid)
        self.embed_segments = nn.Embedding(e.segments, width) if e.segments else None
        self.embed_norm = build_model_norm(config) if e.norm else None
        self.relative_bias: RelativeBias | None = None
        biases = [self._position_bias(layer) for layer in layers]
        self.layers = nn.ModuleList(
            Layer(config, layer, index, bias) for index, (layer, bias) in enumerate(zip(layers, biases, strict=True))
        )
        self.norm = build_model_norm(config) if config.norm.final else None

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """Token vectors x (rows, T, width) -> hidden states, after the last norm."""
        x = self.begin(x, shared)
        for layer in self.layers:
            x = layer(x, shared)
        return self.end(x)

    def begin(self, x: Tensor, shared: Shared) -> Tensor:
        """What stands before the first layer."""
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=x.dtype)
        if self.embed_segments is not None:
            first = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
            x = x + self.embed_segments(first if shared.segments is None else shared.segments).to(x.dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(shared.positions).to(x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return x

    def end(self, x: Tensor) -> Tensor:
        """What stands behind the last layer."""
        return x if self.norm is None else self.norm(x)

    def _position_bias(self, layer: LayerConfig) -> PositionBias | None:
        a = layer.attention
        if isinstance(a.position, AlibiPosition):
            return Alibi(a.heads)
        if not isinstance(a.position, BucketPosition):
            return None
        if self.relative_bias is None:  # one table for all layers
            buckets, longest = a.position.buckets, a.position.max_distance
            self.relative_bias = RelativeBias(buckets, a.heads, max_distance=longest, bidirectional=a.bidirectional)
        return self.relative_bias


def build_model_norm(config: ModelConfig) -> nn.Module:
    """The norm over the width that this model uses everywhere."""
    n = config.norm
    return build_norm(n.kind, config.width, config.norm_eps, bias=n.bias, unit_offset=n.unit_offset)


def build_mixer(config: ModelConfig, layer: LayerConfig, index: int, bias: PositionBias | None) -> nn.Module:
    """The module that lets tokens see each other."""
    a, width, eps = layer.attention, config.width, config.norm_eps
    if isinstance(a, LatentAttentionConfig):
        return LatentAttention(
            width, a.heads, q_rank=a.q_rank, kv_rank=a.kv_rank, nope_dim=a.nope_dim, rope_dim=a.rope_dim,
            value_dim=a.value_dim, bias=a.bias, scale=a.scale, layer=index,
        )  # fmt: skip
    if isinstance(a, RelativeAttentionConfig):
        return RelativeAttention(width, a.heads, a.head_dim)
    qk_norm = partial(_head_norm, config) if a.qk_norm else None
    return Attention(
        width, a.heads, a.kv_heads, a.head_dim, qkv_bias=a.qkv_bias, output_bias=a.output_bias, qk_norm=qk_norm,
        l2_norm=eps if a.l2_norm else None, mask=a.mask, scale=a.scale, softcap=a.softcap, sinks=a.sinks, bias=bias,
        query_scale=_query_scale(a.query_scaling), layer=index,
    )  # fmt: skip


def build_feed_forward(config: ModelConfig, f: FeedForwardConfig | ExpertsConfig) -> nn.Module:
    """A dense feed-forward, or experts."""
    if isinstance(f, FeedForwardConfig):
        return FeedForward(config.width, f.hidden, activation=f.activation, gated=f.gated, bias=f.bias)
    return MixtureOfExperts(
        config.width, f.hidden, f.count, f.router, activation=f.activation, gated=f.gated, bias=f.bias, limit=f.limit,
        shared_hidden=f.shared_hidden, shared_gate=f.shared_gate, scale_input=f.scale_input,
    )  # fmt: skip


def _head_norm(config: ModelConfig, head_dim: int) -> nn.Module:
    return build_norm("rms", head_dim, config.norm_eps, unit_offset=config.norm.unit_offset)


def _query_scale(scaling: LogN | QueryTemperature | None) -> QueryScale | None:
    if isinstance(scaling, LogN):
        return cast(QueryScale, partial(log_n_scale, trained=scaling.trained))
    if isinstance(scaling, QueryTemperature):
        return cast(QueryScale, partial(temperature_scale, floor=scaling.floor, scale=scaling.scale))
    return None
