"""The one Transformer: decoder, encoder or both, built from a `ModelConfig`. No family has a class of its own.

    x = embed(ids);  for each layer: x = x + mix(norm(x));  x = x + feed_forward(norm(x));  logits = head(norm(x))

`models.layer` holds a layer and its embedding, `models.config` every way in which models differ. Module names are the
Hugging Face names of Llama, so a checkpoint of the families that use them needs no translation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hanlin.models.config import AttentionConfig, ModelConfig
from hanlin.models.layer import Layer, Stack, build_model_norm
from hanlin.models.shared import RowSharing, Shared
from hanlin.nn.activations import activation
from hanlin.nn.attention import Cache
from hanlin.nn.experts import Experts
from hanlin.nn.linear import Linear
from hanlin.nn.mask_lowering import Lowered, lower, sees_itself
from hanlin.nn.masks import Mask
from hanlin.nn.multi_token import MultiTokenPrediction
from hanlin.nn.relative_attention import RelativeAttention
from hanlin.nn.routing import Router, Routing

if TYPE_CHECKING:
    from hanlin.models.tensor_plan import Part

OWN_INIT = (Router, Experts, RelativeAttention)


@dataclass(frozen=True)
class Output:
    """hidden (rows, T, width): after the last norm. logits (rows, T or 1, vocabulary), or None if not asked for.
    routing: how each layer with experts routed its tokens, for the losses that balance them."""

    logits: Tensor | None
    hidden: Tensor
    routing: tuple[Routing, ...] = ()


class HeadTransform(nn.Module):
    """BERT's dense layer, activation and norm in front of the output matrix (arXiv:1810.04805)."""

    def __init__(self, config: ModelConfig, name: str) -> None:
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.activation = activation(name)
        self.norm = build_model_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))


class Transformer(nn.Module):
    """Built from a config with random weights (normal, `init_std`; norms 1, biases 0); `load_model` fills them.

    compute_dtype: the dtype of the activations; None follows the weights. bf16 activations over fp32 weights are the
    mixed precision of training: every `Linear` casts its weight on use, norms and the softmax keep fp32 statistics.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Stack(config, config.encoder, embeds=False) if config.encoder else None
        self.model = Stack(config, config.layers)
        head = config.head
        self.head_transform = HeadTransform(config, head.transform) if head is not None and head.transform else None
        self.ahead: MultiTokenPrediction | None = None
        if config.predict_ahead:
            depth = len(config.layers)
            self.ahead = MultiTokenPrediction(
                config.predict_ahead, config.width,
                layer=lambda k: Layer(config, config.layers[-1], depth + k, None),
                norm=partial(build_model_norm, config),
            )  # fmt: skip
        self.lm_head = None if head is None else Linear(config.width, config.vocab_size, bias=head.bias)
        self.compute_dtype: torch.dtype | None = None
        self.part: Part | None = None  # what this rank holds of it, if it was cut (`parallel.tensor`)
        self.context: RowSharing | None = None  # with whom it shares the tokens of a row (`parallel.context`)
        self.score_elsewhere: Callable[[Any], Tensor] | None = None  # a batch's loss, where stages lie on other ranks
        self.reset_parameters()
        if config.tied_embeddings and self.lm_head is not None:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices normal with `init_std`, biases 0, norms as their modules begin."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.init_std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, OWN_INIT):  # parameters that are no layer of their own
                module.init_weights(self.config.init_std)

    @property
    def device(self) -> torch.device:
        return self._some_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.compute_dtype or self._some_weight().dtype

    @property
    def head_weight(self) -> Tensor:
        """(vocabulary, width): for losses that never build all logits (`nn.losses.linear_cross_entropy`)."""
        return self._head().weight

    @property
    def head_bias(self) -> Tensor | None:
        """(vocabulary,), or None."""
        return self._head().bias

    def head_hidden(self, hidden: Tensor) -> Tensor:
        """What the output matrix multiplies: hidden states (..., width) through BERT's transform, scaled as T5 does."""
        head = self.config.head
        if self.head_transform is not None:
            hidden = self.head_transform(hidden)
        return hidden if head is None or head.input_scale == 1 else hidden * head.input_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., width) -> (..., vocabulary)."""
        head, out = self.config.head, self._head()(self.head_hidden(hidden))
        if head is not None and head.scale != 1:
            out = out * head.scale
        return out if head is None or head.softcap is None else torch.tanh(out / head.softcap) * head.softcap

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        segments: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Mask | None = None,
        logits: Literal["all", "last"] | None = "all",
    ) -> Output:
        """ids (rows, T) int64 -> `Output`.

        positions (rows or 1, T): the position of each token in its own document; default 0 … T-1, or the cache's.
        mask: who sees whom, by default what the layers say (causal, or everything); each layer adds its own window.
            With packed documents pass `Causal() & SameDocument(documents)` and their positions.
            With a cache it counts indices of the whole sequence; what it shows of the future (the prompt of a prefix
            language model) must be read in one piece.
        cache: one step over rows that continue earlier tokens (`nn.attention.Cache`); cached equals uncached.
        segments (rows, T): of models that embed them (BERT's sentence A and B); default 0.
        source (rows, S, width): what `encode` returned, for a model with an encoder; source_mask: which of it is real.
            A cache that keeps what was read of it (`Cache.source`) takes its place.
        logits: for every token, for the last one, or not at all (then use `hidden` and `head_weight`).
        """
        shared = self.share(
            ids, positions=positions, mask=mask, cache=cache, segments=segments, source=source, source_mask=source_mask
        )
        hidden = self.model(self.embed(ids), shared)
        routing = tuple(shared.routing)
        if logits is None:
            return Output(None, hidden, routing)
        return Output(self.logits(hidden if logits == "all" else hidden[:, -1:]), hidden, routing)

    def share(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        segments: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Mask | None = None,
    ) -> Shared:
        """What the layers share while they read `ids` (rows, T), of which only the shape counts; as `forward`."""
        if cache is not None and mask is not None:
            _check_cached_mask(self.config, mask)
        kept = cache is not None and cache.source is not None
        if (source is None and not kept) != (self.encoder is None):
            needs = "needs `source`, what `encode` returns" if source is None else "has no encoder to give `source`"
            raise ValueError(f"This model {needs}.")
        if cache is None and self.context is not None:
            cache = self.context.step(*ids.shape, mask, ids.device)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None] if cache is None else cache.positions
        reads: Lowered | None = None
        if source is not None and source_mask is not None:
            reads = lower(source_mask, ids.shape[1], keys=source.shape[1], dtype=self.dtype, device=ids.device)
        return Shared(
            positions, ids.shape[1], self.dtype, self.config.max_positions, mask, cache, source, reads, segments
        )

    def look_ahead(
        self, hidden: Tensor, ids: Tensor, *, positions: Tensor | None = None, mask: Mask | None = None
    ) -> list[Tensor]:
        """Multi-token prediction (`ModelConfig.predict_ahead`): hidden (rows, T, width) and the ids they were made from
        -> a hidden state for each further token, `nn.multi_token.losses_ahead` takes them. positions, mask: as
        `forward`."""
        if self.ahead is None:
            raise ValueError("This model predicts one token only; make it with `predict_ahead`.")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        shared = Shared(positions, ids.shape[1], self.dtype, self.config.max_positions, mask)
        return self.ahead(hidden, ids, embed=self.embed, run=lambda layer, x: layer(x, shared))

    def embed(self, ids: Tensor) -> Tensor:
        """The vectors of tokens, in the dtype of the activations: (rows, T) -> (rows, T, width)."""
        return self.model.embed_tokens(ids).to(self.dtype)

    def encode(self, ids: Tensor, *, positions: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """The encoder of a model that has both: ids (rows, S) -> hidden states (rows, S, width), `source` of `forward`.
        mask: which tokens are real (`Padding`)."""
        if self.encoder is None:
            raise ValueError("This model has no encoder beside its decoder; call the model itself.")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        shared = Shared(positions, ids.shape[1], self.dtype, self.config.max_positions, mask)
        return self.encoder(self.embed(ids), shared)

    def _some_weight(self) -> Tensor:
        """The token vectors; without them, in the middle of a pipeline, any other."""
        table = getattr(self.model, "embed_tokens", None)
        return next(self.parameters()) if table is None else table.weight

    def _head(self) -> Linear:
        if self.lm_head is None:
            raise ValueError("This model was made without an output head; ask for `logits=None` and use `hidden`.")
        return self.lm_head

    def parameter_count(self) -> int:
        """Trainable and frozen, shared ones once."""
        return sum(p.numel() for p in self.parameters())


def _check_cached_mask(config: ModelConfig, mask: Mask) -> None:
    """Refuse what a cache cannot honour: a query that sees nothing, other mixers than plain attention."""
    if not sees_itself(mask):
        raise ValueError(f"With a cache every token must see itself, which {mask} does not promise.")
    if not all(isinstance(layer.attention, AttentionConfig) for layer in config.layers):
        raise ValueError("Only plain attention takes a `mask` together with a `cache`.")
