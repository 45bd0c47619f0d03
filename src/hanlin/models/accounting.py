"""What a model costs, from its config alone: parameters, FLOPs and cache, part by part, without building it.

A product of (m, k) by (k, n) is 2 m k n FLOPs. Backward has two products for each one forward, so a training step is
three times the forward pass. Counted are products only; norms, softmax and activations are a few percent of them at
most.

    scores    2 * (width of a key + width of a value) * heads    for each pair of a query and a key that it sees
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from hanlin.models.config import (
    AttentionConfig,
    BucketPosition,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    Mixer,
    ModelConfig,
    RelativeAttentionConfig,
)
from hanlin.nn.masks import And, Bidirectional, Causal, Mask, Window

PARTS = ("embedding", "attention", "cross-attention", "feed-forward", "experts", "router", "norms", "head", "ahead")
Pairs = Literal["seen", "all"]


@dataclass(frozen=True)
class Parameters:
    """parts: {part: how many}; active: how many take part in one token (of the experts, the chosen ones). A head that
    shares the embedding has none of its own."""

    parts: dict[str, int]
    active: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Flops:
    """parts: {part: FLOPs of one forward pass}; constant: those of them whose input is no parameter's work, such as a
    table of distances, so that backward has one product less."""

    parts: dict[str, float]
    constant: float = 0.0

    @property
    def forward(self) -> float:
        return sum(self.parts.values())

    @property
    def backward(self) -> float:
        return 2.0 * self.forward - self.constant

    @property
    def training(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Product:
    """A matrix (out, into), and how many of its kind there are and take part in one token; vectors: bias and the
    like."""

    part: str
    into: int
    out: int
    copies: int = 1
    active: int = 1
    vectors: int = 0


def count_parameters(config: ModelConfig) -> Parameters:
    """Exactly what `Transformer(config)` holds (a test builds every family)."""
    parts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    active = 0
    for layer in (*config.layers, *config.encoder):
        for p in layer_products(config, layer):
            parts[p.part] += p.copies * (p.into * p.out + p.vectors)
            active += p.active * (p.into * p.out + p.vectors)
        extra = _layer_vectors(config, layer)
        parts.update(extra)
        active += sum(extra.values())
    rest = _outside_layers(config)
    if config.predict_ahead:  # a layer, a projection of two states to one and three norms a step
        last = replace(config, layers=config.layers[-1:], encoder=(), predict_ahead=0)
        one, around = count_parameters(last), 2 * config.width**2 + 3 * _norm_size(config)
        outside = sum(_outside_layers(last).values())
        rest["ahead"] = config.predict_ahead * (one.total - outside + around)
        active -= config.predict_ahead * (one.total - one.active)  # of its experts, too, the chosen ones
    parts.update(rest)
    return Parameters(dict(parts), active + sum(rest.values()))


def count_flops(
    config: ModelConfig, batch: int, length: int, *, source: int | None = None, pairs: Pairs = "seen"
) -> Flops:
    """One forward pass over `batch` rows of `length` tokens (and `source` tokens of an encoder; default `length`).

    pairs "seen": of queries and keys, those that the masks show; "all": the whole matrix, as kernels without blocks
    compute it.
    """
    parts: dict[str, float] = defaultdict(float)
    constant = 0.0
    read = length if source is None else source
    for stack, tokens in ((config.layers, length), (config.encoder, read)):
        for layer in stack:
            for p in layer_products(config, layer):
                of_source = p.part == "cross-attention" and p.copies == 2  # keys and values
                reads = read if of_source else tokens
                parts[p.part] += 2.0 * batch * reads * p.active * p.into * p.out
            heads, key, value = _widths(layer.attention)
            seen = tokens * tokens if pairs == "all" else visible_pairs(layer.attention.mask, tokens)
            parts["attention"] += 2.0 * batch * heads * (key + value) * seen
            if isinstance(layer.attention, RelativeAttentionConfig):
                distances = 2.0 * 2 * tokens * heads * key * config.width
                parts["attention"] += distances + 2.0 * 2 * tokens * heads * key * batch * tokens
                constant += distances
            if layer.cross_attention is not None:
                c = layer.cross_attention
                parts["cross-attention"] += 4.0 * batch * c.heads * c.head_dim * tokens * read
    if config.head is not None:
        transform = config.width**2 if config.head.transform else 0
        parts["head"] += 2.0 * batch * length * (config.vocab_size * config.width + transform)
    return Flops(dict(parts), constant)


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """Forward and backward FLOPs of one token in a sequence of `length` (see `ModelConfig.flops_per_token`), whose
    source is as long where there is an encoder."""
    matmul = config.vocab_size * config.width if config.head is not None else 0
    attention = 0
    for layer in (*config.layers, *config.encoder):
        matmul += sum(p.active * p.into * p.out for p in layer_products(config, layer))
        heads, key, value = _widths(layer.attention)
        attention += heads * (key + value) * min(length, layer.attention.window or length)
        if (cross := layer.cross_attention) is not None:
            attention += 2 * cross.heads * cross.head_dim * length
    return 6.0 * matmul + 6.0 * attention


def visible_pairs(mask: Mask, length: int) -> int:
    """How many (query, key) pairs of a row of `length` tokens a mask shows."""
    if isinstance(mask, Bidirectional):
        return length * length
    if isinstance(mask, Causal):
        return length * (length + 1) // 2
    if isinstance(mask, And) and len(mask.parts) == 2 and {type(p) for p in mask.parts} == {Causal, Window}:
        size = min(length, next(p.size for p in mask.parts if isinstance(p, Window)))
        return size * (size + 1) // 2 + (length - size) * size
    index, block, total = torch.arange(length), 1024, 0
    for start in range(0, length, block):
        rows = index[start : start + block]
        shown = mask.dense(rows, index).expand(-1, len(rows), length)
        total += int(shown.sum()) // len(shown)
    return total


def layer_products(config: ModelConfig, layer: LayerConfig) -> Iterator[Product]:
    """The matrices of one layer."""
    width, a, f = config.width, layer.attention, layer.feed_forward
    yield from _mixer_products(width, a)
    if (c := layer.cross_attention) is not None:
        H, K = c.heads * c.head_dim, c.kv_heads * c.head_dim
        yield Product("cross-attention", width, H, vectors=H * c.qkv_bias)
        yield Product("cross-attention", width, K, copies=2, active=2, vectors=K * c.qkv_bias)
        yield Product("cross-attention", H, width, vectors=width * c.output_bias)
    if isinstance(f, FeedForwardConfig):
        yield from _feed_forward_products("feed-forward", width, f.hidden, f.gated, bias=f.bias)
        return
    chosen = f.router.top_k
    yield Product("router", width, f.count, vectors=f.count * f.router.bias)
    for p in _feed_forward_products("experts", width, f.hidden, f.gated, bias=f.bias):
        yield Product(p.part, p.into, p.out, f.count * p.copies, chosen * p.copies, p.vectors)
    if f.shared_hidden:
        yield from _feed_forward_products("experts", width, f.shared_hidden, f.gated, bias=False)
        if f.shared_gate:
            yield Product("router", width, 1)


def _mixer_products(width: int, a: Mixer) -> Iterator[Product]:
    if isinstance(a, AttentionConfig):
        H, K = a.heads * a.head_dim, a.kv_heads * a.head_dim
        yield Product("attention", width, H, vectors=H * a.qkv_bias)
        yield Product("attention", width, K, copies=2, active=2, vectors=K * a.qkv_bias)
        yield Product("attention", H, width, vectors=width * a.output_bias)
    elif isinstance(a, LatentAttentionConfig):
        query = a.heads * (a.nope_dim + a.rope_dim)
        if a.q_rank is not None:
            yield Product("attention", width, a.q_rank, vectors=a.q_rank * a.bias)
        yield Product("attention", a.q_rank or width, query)
        yield Product("attention", width, a.kv_rank + a.rope_dim, vectors=(a.kv_rank + a.rope_dim) * a.bias)
        yield Product("attention", a.kv_rank, a.heads * (a.nope_dim + a.value_dim))
        yield Product("attention", a.heads * a.value_dim, width, vectors=width * a.bias)
    else:
        H = a.heads * a.head_dim
        yield Product("attention", width, H, copies=3, active=3)
        yield Product("attention", H, width)


def _feed_forward_products(part: str, width: int, hidden: int, gated: bool, *, bias: bool) -> Iterator[Product]:
    ways = 2 if gated else 1
    yield Product(part, width, hidden, copies=ways, active=ways, vectors=hidden * bias)
    yield Product(part, hidden, width, vectors=width * bias)


def _widths(a: Mixer) -> tuple[int, int, int]:
    """(query heads, width of a key, width of a value), as a whole pass computes them."""
    if isinstance(a, LatentAttentionConfig):
        return a.heads, a.nope_dim + a.rope_dim, a.value_dim
    return a.heads, a.head_dim, a.head_dim


def _layer_vectors(config: ModelConfig, layer: LayerConfig) -> dict[str, int]:
    """What a layer holds beside its matrices and their biases."""
    a = layer.attention
    norms = (4 if layer.norms == "sandwich" else 2) + (layer.cross_attention is not None)
    found = {"norms": norms * _norm_size(config), "attention": 0}
    if isinstance(a, AttentionConfig):
        found["norms"] += 2 * a.head_dim * a.qk_norm
        found["attention"] += a.heads * a.sinks
    elif isinstance(a, LatentAttentionConfig):
        found["norms"] += a.kv_rank + (a.q_rank or 0)
    else:  # the projection of distances, three biases, two segment vectors
        H = a.heads * a.head_dim
        found["attention"] += config.width * H + 5 * H
    return found


def _outside_layers(config: ModelConfig) -> dict[str, int]:
    e, width, stacks = config.embedding, config.width, 2 if config.encoder else 1
    tokens = config.vocab_size * width
    table = (config.max_positions + e.offset) * width if e.positions == "learned" else 0
    norm = _norm_size(config)
    found = {
        "embedding": tokens + stacks * (table + e.segments * width),
        "norms": stacks * norm * (e.norm + config.norm.final),
        "attention": 0,
        "head": 0,
    }
    for stack in (config.layers, config.encoder):
        bias = next((la.attention for la in stack if isinstance(la.attention.position, BucketPosition)), None)
        if bias is not None and isinstance(bias.position, BucketPosition):
            found["attention"] += bias.position.buckets * bias.heads
    if any(isinstance(layer.attention, RelativeAttentionConfig) for layer in config.layers):
        found["embedding"] += width  # where the second stream begins
    if config.head is not None:
        found["head"] += (0 if config.tied_embeddings else tokens) + config.vocab_size * config.head.bias
        if config.head.transform:
            found["head"] += width * width + width
            found["norms"] += norm
    return found


def _norm_size(config: ModelConfig) -> int:
    return config.width * (2 if config.norm.kind == "layer" and config.norm.bias else 1)
