"""The one Transformer: pre-norm decoder of the Llama / Qwen3 kind, built from a `ModelConfig`.

    x = embed(ids);  x += attention(norm(x));  x += feed_forward(norm(x));  logits = head(norm(x))

Module names are the Hugging Face names, so a checkpoint needs no translation for the families that use them.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.models.config import LayerConfig, ModelConfig
from hanlin.nn.attention import Attention, Cache
from hanlin.nn.feed_forward import SwiGLU
from hanlin.nn.linear import Linear
from hanlin.nn.masks import Causal, Lowered, Mask, Window, lower
from hanlin.nn.norms import RMSNorm
from hanlin.nn.rope import inverse_frequencies, rope_tables


@dataclass(frozen=True)
class Output:
    """hidden (rows, T, width): after the last norm. logits (rows, T or 1, vocabulary), or None if not asked for."""

    logits: Tensor | None
    hidden: Tensor


class Layer(nn.Module):
    def __init__(self, config: LayerConfig, width: int, norm_eps: float, index: int) -> None:
        super().__init__()
        a, f = config.attention, config.feed_forward
        self.input_layernorm = RMSNorm(width, norm_eps)
        self.self_attn = Attention(
            width, a.heads, a.kv_heads, a.head_dim, qkv_bias=a.qkv_bias, output_bias=a.output_bias,
            qk_norm=a.qk_norm, norm_eps=norm_eps, window=a.window, layer=index,
        )  # fmt: skip
        self.post_attention_layernorm = RMSNorm(width, norm_eps)
        self.mlp = SwiGLU(width, f.hidden, bias=f.bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Lowered | None, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and last norm: what the Hugging Face names put under `model.`"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(c, config.width, config.norm_eps, i) for i, c in enumerate(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


class Transformer(nn.Module):
    """Built from a config with random weights (normal, `init_std`; norms 1, biases 0); `load_model` fills them.

    compute_dtype: the dtype of the activations; None follows the weights. bf16 activations over fp32 weights are the
    mixed precision of training: every `Linear` casts its weight on use, norms and the softmax keep fp32 statistics.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        self.compute_dtype: torch.dtype | None = None
        self._inverse: dict[tuple[torch.device, int], Tensor] = {}  # rotary frequencies: fp32 in any precision
        self.reset_parameters()
        if config.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.init_std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head_weight(self) -> Tensor:
        """(vocabulary, width): for losses that never build all logits (`nn.losses.linear_cross_entropy`)."""
        return self.lm_head.weight

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        logits: Literal["all", "last"] | None = "all",
    ) -> Output:
        """ids (rows, T) int64 -> `Output`.

        positions (rows or 1, T): the position of each token in its own document; default 0 … T-1, or the cache's.
        mask: who sees whom, `Causal()` by default; each layer adds its own window. With packed documents pass
            `Causal() & SameDocument(documents)` and their positions. Not together with `cache`.
        cache: one step over rows that continue earlier tokens (`nn.attention.Cache`); cached equals uncached.
        logits: for every token, for the last one, or not at all (then use `hidden` and `head_weight`).
        """
        if cache is not None and mask is not None:
            raise ValueError(
                "A cache attends causally to its own sequence: `mask` cannot be given together with `cache`."
            )
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None] if cache is None else cache.positions
        dtype = self.compute_dtype or self.model.embed_tokens.weight.dtype
        x = F.embedding(ids, self.model.embed_tokens.weight).to(dtype)  # (rows, T, width)
        ropes: dict[int, tuple[Tensor, Tensor]] = {}
        lowered: dict[int | None, Lowered] = {}
        base = mask or Causal()
        for layer in self.model.layers:
            a = cast(Attention, layer.self_attn)
            if a.head_dim not in ropes:
                ropes[a.head_dim] = rope_tables(positions, self._frequencies(a.head_dim), dtype)
            if cache is None and a.window not in lowered:
                whole = base if a.window is None or a.window >= ids.shape[1] else base & Window(a.window)
                lowered[a.window] = lower(whole, ids.shape[1], dtype=dtype, device=ids.device)
            x = layer(x, ropes[a.head_dim], lowered.get(a.window) if cache is None else None, cache)
        hidden = self.model.norm(x)
        if logits is None:
            return Output(None, hidden)
        return Output(self.lm_head(hidden if logits == "all" else hidden[:, -1:]), hidden)

    def _frequencies(self, head_dim: int) -> Tensor:
        key = (self.device, head_dim)
        if key not in self._inverse:
            self._inverse[key] = inverse_frequencies(head_dim, self.config.rope_theta).to(self.device)
        return self._inverse[key]

    def parameter_count(self) -> int:
        """Trainable and frozen, shared ones once."""
        return sum(p.numel() for p in self.parameters())
