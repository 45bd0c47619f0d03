"""`ModelConfig`: what each layer of a model is. A family differs from another by these values and by nothing else.

    ModelConfig   vocabulary, width, embedding, head, norms, and its layers (those of an encoder beside them)
    LayerConfig   one layer: attention (or another mixer), cross-attention, feed-forward, where its norms stand

All are frozen and hashable: two models are the same exactly if their configs are equal.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from hanlin.core.errors import HanlinError
from hanlin.nn.masks import Bidirectional, Causal, Chunk, Mask, Window
from hanlin.nn.rope import Rope
from hanlin.nn.routing import RouterConfig

if TYPE_CHECKING:
    from hanlin.models.accounting import Flops, Parameters


@dataclass(frozen=True)
class AlibiPosition:
    """A penalty that grows with the distance, another slope for each head (arXiv:2108.12409)."""


@dataclass(frozen=True)
class BucketPosition:
    """A learnt bias for each bucket of distances, one table for all layers (T5, arXiv:1910.10683)."""

    buckets: int = 32
    max_distance: int = 128


@dataclass(frozen=True)
class BlockRopePosition:
    """2-D rotary positions (GLM, arXiv:2103.10360): the first half of a head turns by the place in the text, the second
    by the place in the span that is being written; `positions` is then (2, rows, T). half: the frequencies are rounded
    to fp16, as ChatGLM-6B was trained."""

    theta: float = 10_000.0
    half: bool = False


ROTARY, INTERLEAVED = Rope(), Rope(interleaved=True)
Position = Rope | AlibiPosition | BucketPosition | BlockRopePosition


@dataclass(frozen=True)
class LogN:
    """Queries past the trained length are scaled by log_trained(position) (Qwen 1)."""

    trained: int


@dataclass(frozen=True)
class QueryTemperature:
    """Queries are scaled by 1 + scale * ln(1 + floor((position + 1) / floor)) (Llama 4's layers without positions)."""

    floor: int
    scale: float


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention. Who sees whom is `mask`: causal (or `bidirectional`), the last `window` keys, the own
    `chunk` of the row, and any further `pattern`.

    position: how a score knows the distance; None: it does not. scale: of the scores (None: head_dim^-0.5).
    qk_norm: an RMS norm with a weight on each query and key head before they turn; l2_norm: one without a weight,
    after (Llama 4). sinks: a learnt logit for each head that takes part in the softmax and gives nothing (gpt-oss).
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    chunk: int | None = None
    bidirectional: bool = False
    pattern: Mask | None = None
    position: Position | None = ROTARY
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    l2_norm: bool = False
    query_scaling: LogN | QueryTemperature | None = None

    @property
    def limits(self) -> Mask:
        """What the mask says beside the direction: window, chunk, pattern."""
        mask: Mask = Bidirectional() if self.pattern is None else self.pattern
        if self.window is not None:
            mask = mask & Window(self.window)
        if self.chunk is not None:
            mask = mask & Chunk(self.chunk)
        return mask

    @property
    def mask(self) -> Mask:
        """Who sees whom."""
        return self.limits if self.bidirectional else Causal() & self.limits

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(key heads, width of a key, width of a value) that a token leaves in a cache."""
        return self.kv_heads, self.head_dim, self.head_dim


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads come from one latent of
    `kv_rank` numbers; `rope_dim` more numbers carry the position. q_rank None: queries without a latent."""

    heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int | None = None
    bias: bool = False
    position: Rope = INTERLEAVED
    scale: float | None = None

    window = None
    bidirectional = False
    limits = Bidirectional()
    mask = Causal()

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """The values are the first numbers of the keys: nothing of their own is kept."""
        return 1, self.kv_rank + self.rope_dim, 0


@dataclass(frozen=True)
class RelativeAttentionConfig:
    """Transformer-XL's relative attention as XLNet has it (arXiv:1906.08237), with segments and two streams."""

    heads: int
    head_dim: int
    bidirectional: bool = True
    position: None = None

    window = None
    limits = Bidirectional()

    @property
    def mask(self) -> Mask:
        return Bidirectional() if self.bidirectional else Causal()

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return self.heads, self.head_dim, self.head_dim


@dataclass(frozen=True)
class FeedForwardConfig:
    """`hidden` units; gated: a product of two projections, one through the activation (SwiGLU, GeGLU), else one."""

    hidden: int
    bias: bool = False
    activation: str = "silu"
    gated: bool = True


@dataclass(frozen=True)
class ExpertsConfig:
    """`count` feed-forwards of `hidden` units, of which the router picks some for each token.

    shared_hidden: units of the expert that every token goes through (0: none); shared_gate: its output is scaled by a
    sigmoid of the token. scale_input: the router's weight scales what goes into an expert, not what comes out.
    limit: the clamp of gpt-oss's SwiGLU.
    """

    count: int
    hidden: int
    router: RouterConfig
    bias: bool = False
    activation: str = "silu"
    gated: bool = True
    shared_hidden: int = 0
    shared_gate: bool = False
    scale_input: bool = False
    limit: float | None = None


Mixer = AttentionConfig | LatentAttentionConfig | RelativeAttentionConfig


@dataclass(frozen=True)
class LayerConfig:
    """norms: where they stand around a sublayer f.

        pre       x + f(norm(x))                  Llama, GPT-2, T5
        post      norm(x + f(x))                  the original Transformer, BERT, BART
        sandwich  x + norm(f(norm(x)))            Gemma 2, GLM-4

    residual_scale multiplies the x of the sum (DeepNorm, arXiv:2203.00555); residual_from_norm puts norm(x) in the
    place of x (ChatGLM-6B).
    """

    attention: Mixer
    feed_forward: FeedForwardConfig | ExpertsConfig
    cross_attention: AttentionConfig | None = None
    norms: Literal["pre", "post", "sandwich"] = "pre"
    residual_scale: float = 1.0
    residual_from_norm: bool = False


@dataclass(frozen=True)
class EmbeddingConfig:
    """positions: a table added to the tokens, learnt or sinusoidal (its rows start at `offset`); sinusoid: how sines
    and cosines stand in a row. segments: kinds of segment; norm: after the sum; scale: of the token vectors."""

    positions: Literal["learned", "sinusoidal"] | None = None
    offset: int = 0
    segments: int = 0
    norm: bool = False
    scale: float | None = None
    sinusoid: Literal["interleaved", "halves"] = "halves"


@dataclass(frozen=True)
class HeadConfig:
    """logits = softcap(scale * (transform(hidden) W^T + bias)). transform: BERT's dense layer, its activation's name,
    and norm. input_scale multiplies the hidden states (T5 v1.0)."""

    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    input_scale: float = 1.0
    transform: str | None = None


@dataclass(frozen=True)
class NormConfig:
    """unit_offset: the weight is stored as what it differs from 1 (Gemma)."""

    kind: Literal["rms", "layer"] = "rms"
    bias: bool = True
    unit_offset: bool = False
    final: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, an encoder (layers that look both ways, a head or none), or both (`encoder` beside `layers`).

    `family` names the table by which it is saved (`models.families`); `extra` holds the keys of `config.json` that
    change no number (token ids, version notes), so that saving gives back what was loaded. head None: the model ends at
    `hidden`. predict_ahead: modules of multi-token prediction behind the last layer.
    """

    family: str
    vocab_size: int
    width: int
    layers: tuple[LayerConfig, ...]
    encoder: tuple[LayerConfig, ...] = ()
    max_positions: int = 2048
    norm_eps: float = 1e-6
    norm: NormConfig = NormConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    head: HeadConfig | None = HeadConfig()
    tied_embeddings: bool = False
    predict_ahead: int = 0
    init_std: float = 0.02
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise HanlinError("A model needs at least one layer.")
        if self.embedding.offset and self.embedding.positions != "learned":
            raise HanlinError(f"embedding.offset is {self.embedding.offset}; only a learnt table of positions has one.")
        for index, layer in enumerate(self.layers + self.encoder):
            a = layer.attention
            if isinstance(a, AttentionConfig) and a.heads % a.kv_heads:
                raise HanlinError(
                    f"Layer {index}: {a.heads} query heads do not divide among {a.kv_heads} key/value heads."
                )
            if isinstance(a, AttentionConfig) and isinstance(a.position, Rope) and (a.position.dim or a.head_dim) % 2:
                raise HanlinError(f"Layer {index}: rotary positions need an even head_dim, found {a.head_dim}.")
            if self.encoder and index < len(self.layers) and layer.cross_attention is None:
                raise HanlinError(f"Layer {index}: a decoder beside an encoder needs cross-attention to read it.")

    @classmethod
    def uniform(
        cls,
        family: str,
        *,
        depth: int,
        attention: Mixer,
        feed_forward: FeedForwardConfig | ExpertsConfig,
        rope_theta: float | None = None,
        **rest: Any,
    ) -> "ModelConfig":
        """A config of `depth` equal layers. rope_theta: the base of the attention's rotary positions."""
        if rope_theta is not None:
            if not isinstance(attention.position, Rope):
                raise HanlinError(f"rope_theta is {rope_theta}, but positions are {attention.position}, not rotary.")
            attention = replace(attention, position=replace(attention.position, theta=rope_theta))
        return cls(family=family, layers=(LayerConfig(attention, feed_forward),) * depth, **rest)

    @property
    def rope_theta(self) -> float | None:
        """The base of the first layer that has rotary positions; None: no layer has."""
        positions = (layer.attention.position for layer in self.layers)
        return next((p.theta for p in positions if isinstance(p, Rope)), None)

    @property
    def is_causal(self) -> bool:
        """Whether it writes text from left to right: no layer of the decoder looks ahead."""
        return not any(layer.attention.bidirectional for layer in self.layers)

    def with_vocabulary(self, size: int) -> "ModelConfig":
        return replace(self, vocab_size=size)

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs a token, forward and backward (PaLM, arXiv:2204.02311, appendix B):

            6 * N_matmul + 12 * sum over layers of heads * head_dim * T

        N_matmul are the parameters that take part in a product (the output head once, the embedding lookup not);
        attention counts all T keys, not the causal half. T is capped by a layer's window.
        """
        from hanlin.models.accounting import training_flops_per_token

        return training_flops_per_token(self, length)

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of keys and values that one token leaves in a cache; itemsize: bytes of a number (2: bf16)."""
        shapes = [layer.attention.kv_shape for layer in self.layers]
        return sum(heads * (key + value) for heads, key, value in shapes) * itemsize

    def parameters(self) -> "Parameters":
        """How many there are, by part, and how many take part in one token (`models.accounting`)."""
        from hanlin.models.accounting import count_parameters

        return count_parameters(self)

    def flops(self, batch: int, length: int, *, source: int | None = None) -> "Flops":
        """Of one pass over `batch` rows of `length` tokens, forward and backward, by part (`models.accounting`)."""
        from hanlin.models.accounting import count_flops

        return count_flops(self, batch, length, source=source)
