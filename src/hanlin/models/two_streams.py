"""Two-stream attention (XLNet, arXiv:1906.08237, section 2.3): predict tokens in any order.

    content  h_i   reads token i and what comes before it in the factorisation order
    query    g_i   knows its place, not its token, and reads the content of what comes strictly before

Only h is needed after pretraining, so the Transformer itself runs that stream; here both go through the same layers.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.models.config import RelativeAttentionConfig
from hanlin.models.layer import Layer
from hanlin.models.shared import Shared
from hanlin.models.transformer import Transformer
from hanlin.nn.mask_lowering import lower
from hanlin.nn.masks import Mask
from hanlin.nn.relative_attention import RelativeAttention


def two_streams(
    model: Transformer,
    ids: Tensor,
    *,
    content_mask: Mask,
    query_mask: Mask,
    at: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ids (rows, T) -> hidden states of both streams, (rows, T, width) and (rows, P, width).

    at (rows, P): where the queries stand; None: one at each place. Masks: `Permutation(order)` for the content,
    `Permutation(order, strict=True)` for the queries, with whatever else holds.
    """
    if not all(isinstance(layer.attention, RelativeAttentionConfig) for layer in model.config.layers):
        raise HanlinError("Two streams need relative attention in every layer, as the family xlnet has it.")
    start = model.model.query_embed
    assert start is not None
    length, dtype, device = ids.shape[1], model.dtype, ids.device
    places = torch.arange(length, device=device)[None]
    shared = Shared(places, length, dtype, model.config.max_positions, segments=segments)
    sees = lower(content_mask, length, dtype=dtype, device=device)
    asks = lower(query_mask, length, dtype=dtype, device=device)
    content = F.embedding(ids, model.model.embed_tokens.weight).to(dtype)
    query = start.to(dtype).expand(len(ids), length if at is None else at.shape[1], -1)
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        mixer = cast(RelativeAttention, layer.self_attn)
        distances = shared.distances(content.shape[-1])
        h, g = mixer.two_streams(content, query, distances, sees, asks, segments=segments, at=at)
        content, query = layer.after_mixing(content, h), layer.after_mixing(query, g)
    return content, query
