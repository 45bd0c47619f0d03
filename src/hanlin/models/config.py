"""`ModelConfig`: what each layer of a model is. A family differs from another by these values and by nothing else."""

from dataclasses import dataclass, field, replace
from typing import Any

from hanlin.core.errors import HanlinError


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention with rotary positions. window: how many keys a query sees (None: all before it)."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    window: int | None = None


@dataclass(frozen=True)
class FeedForwardConfig:
    """SwiGLU of `hidden` units."""

    hidden: int
    bias: bool = False


@dataclass(frozen=True)
class LayerConfig:
    attention: AttentionConfig
    feed_forward: FeedForwardConfig


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. `family` is the `model_type` under which it is saved; `extra` holds the keys of `config.json` that
    change no number (token ids, version notes), so that saving gives back what was loaded."""

    family: str
    vocab_size: int
    width: int
    layers: tuple[LayerConfig, ...]
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    init_std: float = 0.02
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise HanlinError("A model needs at least one layer.")
        for index, layer in enumerate(self.layers):
            a = layer.attention
            if a.heads % a.kv_heads:
                raise HanlinError(
                    f"Layer {index}: {a.heads} query heads do not divide among {a.kv_heads} key/value heads."
                )
            if a.head_dim % 2:
                raise HanlinError(f"Layer {index}: rotary positions need an even head_dim, found {a.head_dim}.")

    @classmethod
    def uniform(
        cls, family: str, *, depth: int, attention: AttentionConfig, feed_forward: FeedForwardConfig, **rest: Any
    ):
        """A config of `depth` equal layers."""
        return cls(family=family, layers=(LayerConfig(attention, feed_forward),) * depth, **rest)

    def with_vocabulary(self, size: int) -> "ModelConfig":
        return replace(self, vocab_size=size)

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs a token, forward and backward (PaLM, arXiv:2204.02311, appendix B):

            6 * N_matmul + 12 * sum over layers of heads * head_dim * T

        N_matmul are the parameters that take part in a product (the output head once, the embedding lookup not);
        attention counts all T keys, not the causal half. T is capped by a layer's window.
        """
        head = self.vocab_size * self.width
        matmul, attention = head, 0
        for layer in self.layers:
            a, f = layer.attention, layer.feed_forward
            matmul += self.width * a.head_dim * (2 * a.heads + 2 * a.kv_heads) + 3 * self.width * f.hidden
            attention += a.heads * a.head_dim * min(length, a.window or length)
        return 6.0 * matmul + 12.0 * attention

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token leaves in a cache."""
        return sum(2 * layer.attention.kv_heads * layer.attention.head_dim for layer in self.layers) * itemsize
