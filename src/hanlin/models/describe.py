"""A model in the field's words: what it is, what each layer is, and how two models differ."""

from collections.abc import Iterator
from dataclasses import fields
from itertools import groupby

from hanlin.models.config import (
    AlibiPosition,
    AttentionConfig,
    BlockRopePosition,
    BucketPosition,
    ExpertsConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    Mixer,
    ModelConfig,
)
from hanlin.nn.masks import Bidirectional, Causal
from hanlin.nn.rope import Rope

GATES = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_new": "GeGLU (tanh)", "gelu_pytorch_tanh": "GeGLU (tanh)",
         "relu": "ReGLU", "sigmoid": "GLU"}  # fmt: skip
NORMS = {"rms": "RMSNorm", "layer": "LayerNorm"}


def describe_model(config: ModelConfig) -> dict[str, str]:
    """What holds for the whole model: name -> words."""
    kind = "encoder-decoder" if config.encoder else "decoder" if config.is_causal else "encoder"
    depth = f"{len(config.layers)}" if not config.encoder else f"{len(config.encoder)} + {len(config.layers)}"
    facts = {
        "family": f"{config.family} ({kind})",
        "layers": f"{depth} of width {config.width:,}",
        "vocabulary": f"{config.vocab_size:,}" + (", head shares the embedding" if config.tied_embeddings else ""),
        "context": f"{config.max_positions:,} positions",
        "norm": f"{NORMS[config.norm.kind]}, eps {config.norm_eps:g}" + (", weights from 1" * config.norm.unit_offset),
    }
    e, head = config.embedding, config.head
    added = [f"{e.positions} positions" if e.positions else "", f"{e.segments} segments" if e.segments else "",
             "norm" if e.norm else "", f"scaled by {e.scale:.4g}" if e.scale else ""]  # fmt: skip
    facts["embedding"] = ", ".join(["tokens", *filter(None, added)])
    if head is None:
        facts["head"] = "none: ends at the hidden states"
    else:
        parts = ["bias" if head.bias else "", f"soft-cap {head.softcap:g}" if head.softcap else "",
                 f"{head.transform} transform" if head.transform else ""]  # fmt: skip
        facts["head"] = ", ".join(filter(None, parts)) or "plain"
    if config.predict_ahead:
        facts["predicts"] = f"{config.predict_ahead} tokens further ahead"
    return facts


def describe_layer(layer: LayerConfig) -> dict[str, str]:
    """What one layer is: part -> words."""
    a = layer.attention
    facts = {"attention": attention_words(a), "mask": mask_words(a), "position": position_words(a)}
    if layer.cross_attention is not None:
        facts["cross-attention"] = attention_words(layer.cross_attention)
    facts["feed-forward"] = feed_forward_words(layer.feed_forward)
    facts["norms"] = layer.norms
    if layer.residual_scale != 1 or layer.residual_from_norm:
        source = "norm(x)" if layer.residual_from_norm else "x"
        facts["residual"] = source if layer.residual_scale == 1 else f"{layer.residual_scale:.4g} {source}"
    return facts


def layer_groups(layers: tuple[LayerConfig, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Neighbours that are equal, together: ("0-3", words)."""
    start = 0
    for layer, same in groupby(layers):
        count = len(list(same))
        yield (str(start) if count == 1 else f"{start}-{start + count - 1}"), describe_layer(layer)
        start += count


def differences(a: ModelConfig, b: ModelConfig) -> list[tuple[str, str, str]]:
    """(what, words of a, words of b) wherever two models differ; layers by their number where they differ one by
    one."""
    found = [
        (name, x, y)
        for name, x, y in _side_by_side(describe_model(a), describe_model(b))
        if x != y
    ]  # fmt: skip
    for stack, title in (("layers", "layer"), ("encoder", "encoder layer")):
        mine, other = getattr(a, stack), getattr(b, stack)
        pairs = [
            (name, x, y, index)
            for index, (p, q) in enumerate(zip(mine, other, strict=False))
            for name, x, y in _side_by_side(describe_layer(p), describe_layer(q))
            if x != y
        ]
        for (name, x, y), same in groupby(sorted(pairs, key=lambda r: r[:3]), key=lambda r: r[:3]):
            where = [index for *_, index in same]
            everywhere = len(where) == min(len(mine), len(other))
            found.append((f"{name}, every {title}" if everywhere else f"{name}, {title} {_ranges(where)}", x, y))
    if a.parameters().total != b.parameters().total:
        found.append(("parameters", f"{a.parameters().total:,}", f"{b.parameters().total:,}"))
    if a.kv_bytes_per_token() != b.kv_bytes_per_token():
        found.append(("KV bytes a token, bf16", f"{a.kv_bytes_per_token():,}", f"{b.kv_bytes_per_token():,}"))
    return found


def attention_words(a: Mixer) -> str:
    """The kind of attention, its heads and what else it has."""
    if isinstance(a, LatentAttentionConfig):
        queries = f", queries from {a.q_rank}" if a.q_rank else ""
        return f"MLA, {a.heads} heads of {a.nope_dim}+{a.rope_dim}, values {a.value_dim}, latent {a.kv_rank}{queries}"
    if not isinstance(a, AttentionConfig):
        return f"relative (Transformer-XL), {a.heads} heads of {a.head_dim}"
    if a.kv_heads == a.heads:
        kind = f"MHA, {a.heads} heads of {a.head_dim}"
    else:
        name = "MQA" if a.kv_heads == 1 else "GQA"
        kind = f"{name}, {a.heads} heads on {a.kv_heads} of {a.head_dim}"
    more = [
        "QK norm" if a.qk_norm else "", "L2 norm" if a.l2_norm else "", "QKV bias" if a.qkv_bias else "",
        "output bias" if a.output_bias else "", f"soft-cap {a.softcap:g}" if a.softcap else "",
        "sinks" if a.sinks else "", f"scale {a.scale:.4g}" if a.scale is not None else "",
        type(a.query_scaling).__name__ if a.query_scaling else "",
    ]  # fmt: skip
    return ", ".join([kind, *filter(None, more)])


def mask_words(a: Mixer) -> str:
    """Who sees whom."""
    if a.mask == Causal():
        return "causal"
    return "everything" if a.mask == Bidirectional() else str(a.mask)


def position_words(a: Mixer) -> str:
    """How a score knows the distance."""
    p = a.position
    if isinstance(p, Rope):
        words = [f"rotary, base {p.theta:,.0f}"]
        words += ["interleaved" if p.interleaved else "", f"{p.dim} turn" if p.dim else ""]
        if p.scaling is not None:
            set_ = [f"{f.name} {getattr(p.scaling, f.name)}" for f in fields(p.scaling) if f.name == "factor"]
            words.append(" ".join([type(p.scaling).__name__, *set_]))
        return ", ".join(filter(None, words))
    if isinstance(p, BucketPosition):
        return f"learnt bias of {p.buckets} buckets"
    names = {AlibiPosition: "ALiBi", BlockRopePosition: "rotary on two axes"}
    return names.get(type(p), "relative" if not isinstance(a, AttentionConfig) else "none")


def feed_forward_words(f: FeedForwardConfig | ExpertsConfig) -> str:
    """Kind and size."""
    kind = GATES.get(f.activation, f"gated {f.activation}") if f.gated else f.activation
    bias = ", biases" if f.bias else ""
    if isinstance(f, FeedForwardConfig):
        return f"{kind}, {f.hidden:,} units{bias}"
    shared = f", shared expert of {f.shared_hidden:,}" if f.shared_hidden else ""
    return f"{f.router.top_k} of {f.count} experts ({kind}, {f.hidden:,} units{bias}; {f.router.kind} router){shared}"


def _side_by_side(a: dict[str, str], b: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys([*a, *b]):
        yield name, a.get(name, "-"), b.get(name, "-")


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
