"""The classic formulas by name, each with its source, to stand beside the exact count.

    parameters     12 l h^2 + V h                                                      Kaplan, arXiv:2001.08361, table 1
    model states   16 Phi bytes: 2 + 2 + (4 + 4 + 4) in mixed precision, 4 + 4 + (4 + 4) without
                   ZeRO-1  4 Phi + 12 Phi / D    ZeRO-2  2 Phi + 14 Phi / D    ZeRO-3  16 Phi / D      arXiv:1910.02054
    activations    s b h (34 + 5 a s / h) bytes a layer, fp16, with dropout                            arXiv:2205.05198
                   / t with tensor and sequence parallelism; s b h (10 + 24 / t + 5 a s / (h t)) without the latter
    FLOPs          6 N D;   with attention (6 N + 12 l h s) D                            arXiv:2204.02311, appendix B

They were written for GPT-2: every head has its own keys (kv = a), a feed-forward of 4 h without a gate, dropout, one
dtype, no padding. Where a model differs the formula is off; `Formula.off` says by how much and `why` for which reason.
"""

from dataclasses import dataclass
from typing import Literal

from hanlin.models.config import AttentionConfig, ExpertsConfig, LatentAttentionConfig, LayerConfig, ModelConfig
from hanlin.parallel.settings import Layout

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Formula:
    """One line of the table. value and exact are in `unit` (parameters, bytes, FLOPs); exact None: nothing to compare.
    why: what the formula leaves out here."""

    name: str
    expression: str
    source: str
    unit: str
    value: float
    exact: float | None = None
    why: str = ""

    @property
    def off(self) -> float | None:
        """(value - exact) / exact."""
        return None if not self.exact else self.value / self.exact - 1.0


def parameters_12lh2(config: ModelConfig, *, vocabulary: bool = True) -> float:
    """12 l h^2: attention 4 h^2 and feed-forward 8 h^2 a layer; + V h of the embedding."""
    depth = len(config.layers) + len(config.encoder)
    return 12.0 * depth * config.width**2 + (config.vocab_size * config.width if vocabulary else 0)


def model_state_bytes(parameters: float, *, shard: str = "none", replicas: int = 1, mixed: bool = True) -> float:
    """Weights, gradients and AdamW's states of one rank (ZeRO, arXiv:1910.02054, figure 1).

    mixed: half-precision weights and gradients, fp32 master weights and two moments (2 + 2 + 12); else all fp32 without
    a second copy of the weights (4 + 4 + 8). Both are 16 bytes a parameter, and differ in what ZeRO can share.
    """
    weights, gradients, states = (2.0, 2.0, 12.0) if mixed else (4.0, 4.0, 8.0)
    stage = ("none", "zero1", "zero2", "zero3").index(shard)
    states /= replicas if stage >= 1 else 1
    gradients /= replicas if stage >= 2 else 1
    weights /= replicas if stage >= 3 else 1
    return parameters * (weights + gradients + states)


def pipeline_zero1_bytes(parameters: float, layout: Layout) -> float:
    """PP x ZeRO-1 a GPU: (4 + 12 / D) Phi / (P T), the usual first estimate of a 3D layout."""
    return model_state_bytes(
        parameters / (layout.pipeline * layout.tensor), shard="zero1", replicas=(layout.data or 1) * layout.context
    )


def layer_activations_gpt(s: int, b: int, h: int, a: int, *, tensor: int = 1, sequence: bool = False,
                          recompute: Recompute = "none") -> float:  # fmt: skip
    """Bytes of one layer, 16-bit, multi-head attention, 4 h feed-forward, dropout (Korthikanti, table 2).

    attention 11 s b h + 5 a s^2 b, feed-forward 19 s b h, two norms 4 s b h. selective: the 5 a s^2 b of the scores
    are made again; full: the layer's input 2 s b h alone is kept.
    """
    t = float(tensor)
    if recompute == "full":
        return 2.0 * s * b * h / (t if sequence else 1)
    scores = 0.0 if recompute == "selective" else 5.0 * a * s / h
    if sequence:
        return s * b * h * (34.0 + scores) / t
    return s * b * h * (10.0 + 24.0 / t + scores / t)


def layer_activations_modern(config: ModelConfig, layer: LayerConfig, s: int, b: int, *, itemsize: int = 2) -> float:
    """The same count for grouped heads, a gated feed-forward and flash attention, without dropout:

        s b itemsize (h norm + h in + H q + 2 K kv + H out + h norm + h in + 3 f) + 4 s b a

    H, K: all query and all key heads' numbers; f: hidden units (gate, up and their product; 2 f without a gate); 4 s b
    a: flash attention's fp32 log-sum-exp. Scores are never stored; a norm of queries and keys adds H + K. With experts
    f is of the chosen ones, whose input and output are stored once for each.
    """
    h, at, ff = config.width, layer.attention, layer.feed_forward
    if isinstance(at, LatentAttentionConfig):
        H = at.heads * (at.nope_dim + at.rope_dim)
        latent = (at.q_rank or 0) + 2 * at.kv_rank + at.rope_dim
        mixing = h + latent + H + at.heads * (at.nope_dim + at.rope_dim + at.value_dim) + at.heads * at.value_dim
    else:
        H, heads = at.heads * at.head_dim, at.kv_heads if isinstance(at, AttentionConfig) else at.heads
        mixing = h + H + 2 * heads * at.head_dim + H
        if isinstance(at, AttentionConfig) and at.qk_norm:
            mixing += H + heads * at.head_dim  # before their norm, too
    ways = 3 if ff.gated else 2
    if isinstance(ff, ExpertsConfig):
        feeding = h + ff.router.top_k * (2 * h + ways * ff.hidden) + ways * ff.shared_hidden
    else:
        feeding = h + ways * ff.hidden
    return s * b * (itemsize * (2 * h + mixing + feeding) + 4 * at.heads)


def activations_gpt(config: ModelConfig, s: int, b: int, *, recompute: Recompute = "none", tensor: int = 1,
                    sequence: bool = False) -> float:  # fmt: skip
    """`layer_activations_gpt` over all layers, with the model's width and query heads."""
    return sum(
        layer_activations_gpt(s, b, config.width, layer.attention.heads, tensor=tensor, sequence=sequence,
                              recompute=recompute)
        for layer in config.layers
    )  # fmt: skip


def activations_modern(config: ModelConfig, s: int, b: int, *, itemsize: int = 2) -> float:
    """`layer_activations_modern` over all layers."""
    return sum(layer_activations_modern(config, layer, s, b, itemsize=itemsize) for layer in config.layers)


def training_flops_6nd(parameters: float, tokens: float) -> float:
    """6 N D: two for each weight in the forward pass, four in the backward pass (arXiv:2001.08361)."""
    return 6.0 * parameters * tokens


def training_flops_palm(config: ModelConfig, parameters: float, length: int, tokens: float) -> float:
    """(6 N + 12 l h s) D with h = heads x head_dim: the whole matrix of scores, not the causal half."""
    attention = sum(12.0 * width * length for width in (_heads_width(layer) for layer in config.layers))
    return (6.0 * parameters + attention) * tokens


def rules_of_thumb(parameters: float) -> list[tuple[str, float, float, str]]:
    """(what, lowest bytes, highest bytes, what it stands for): multiples of the 16-bit weights that people say."""
    load = 2.0 * parameters
    return [
        ("load: 2x the billions, in GB", load, load, "2 bytes a parameter in bf16 or fp16, nothing else"),
        ("full fine-tuning: 6-8x what loads", 6 * load, 8 * load, "12 to 16 bytes a parameter: model states of AdamW"),
        ("with activations: 8-10x what loads", 8 * load, 10 * load, "model states and activations of a usual batch"),
    ]


def _heads_width(layer: LayerConfig) -> float:
    """Half the width of a key and a value over all heads: h for a plain attention."""
    a = layer.attention
    if isinstance(a, LatentAttentionConfig):
        return a.heads * (a.nope_dim + a.rope_dim + a.value_dim) / 2
    return a.heads * a.head_dim
