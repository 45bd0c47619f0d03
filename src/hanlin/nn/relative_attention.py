"""Attention by content and by distance (Transformer-XL, arXiv:1901.02860, section 3.3), with XLNet's segments and two
streams (arXiv:1906.08237).

    score(i, j) = scale * [ (q_i + u) . k_j  +  (q_i + w) . W_r R(i - j)  +  (q_i + s) . e(i, j) ]

R(d) is the sinusoid of the distance d; e is one of two vectors: i and j are of one segment, or of two. u, w and s are
learnt biases of a head (`r_w_bias`, `r_r_bias`, `r_s_bias` on disk).

Two streams let a model predict tokens in any order: the content stream h reads the tokens as usual, the query stream g
asks at a position without knowing the token there. Both read the keys and values of h, through the same weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.nn.attention import Cache
from hanlin.nn.linear import Linear, PackedLinear
from hanlin.nn.masks import Lowered


def distance_table(
    queries: int,
    keys: int,
    width: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    clamp: int | None = None,
) -> Tensor:
    """R(keys), R(keys - 1), …, R(1 - queries): (keys + queries, width), sines first. Angles are fp32 in any lower
    precision, fp64 in fp64.

    The queries stand at the last places of the keys. The first row is never read: it lets `relative_shift` be a view.
    clamp: distances beyond it count as it.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    distances = torch.arange(keys, -queries, -1, dtype=wide, device=device)
    if clamp is not None:
        distances = distances.clamp(-clamp, clamp)
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, width, 2, dtype=wide, device=device) / width)
    angles = distances[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)


def relative_shift(scores: Tensor, keys: int) -> Tensor:
    """By distance -> by key: scores (..., T, keys + T), column p of distance keys - p -> (..., T, keys).

    Key j stands at distance keys - T + i - j of query i, in column T - i + j: one to the left with each row. Read flat
    from element T on in rows that are one shorter, the columns line up.
    """
    length, columns = scores.shape[-2:]
    flat = scores.flatten(-2)[..., length:]
    return flat.unflatten(-1, (length, columns - 1))[..., :keys]


class RelativeAttention(PackedLinear):
    """Self-attention of one layer. segments: whether the scores have their term (XLNet) or not (Transformer-XL)."""

    packed = ("k_proj", "v_proj")  # the queries of the second stream are of another input

    def __init__(self, width: int, heads: int, head_dim: int, *, segments: bool = True) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.q_proj = Linear(width, heads * head_dim, bias=False)
        self.k_proj = Linear(width, heads * head_dim, bias=False)
        self.v_proj = Linear(width, heads * head_dim, bias=False)
        self.r_proj = Linear(width, heads * head_dim, bias=False)
        self.o_proj = Linear(heads * head_dim, width, bias=False)
        self.r_w_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.r_r_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.r_s_bias = nn.Parameter(torch.zeros(heads, head_dim)) if segments else None
        self.seg_embed = nn.Parameter(torch.zeros(2, heads, head_dim)) if segments else None
        self.pack()

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """The vectors that no `Linear` holds: normal, as XLNet begins."""
        for parameter in self.parameters(recurse=False):
            parameter.normal_(0.0, std)

    def forward(
        self,
        x: Tensor,
        distances: Tensor,
        mask: Lowered | None,
        cache: Cache | None = None,
        *,
        segments: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """x (rows, T, width) -> (rows, T, width). A cache of keys is refused: what these models recur on is `memory`.

        distances: `distance_table(T, M + T, width)`. segments (rows, T): numbers that are equal within a segment; None:
        the scores lack this term. memory (rows, M, width): what this layer read at the M tokens before, as x now
        (Transformer-XL's recurrence); every query sees it, and it counts as segment 0.
        """
        if cache is not None or mask is None:
            raise HanlinError(
                "Relative attention keeps no cache of keys; give it a mask, and earlier text as `memory`."
            )
        keys, values = self._keys(x if memory is None else torch.cat([memory, x], 1))
        return self._read(self.q_proj(x), keys, values, distances, mask, segments, None)

    def two_streams(
        self,
        content: Tensor,
        query: Tensor,
        distances: Tensor,
        content_mask: Lowered,
        query_mask: Lowered,
        *,
        segments: Tensor | None = None,
        memory: Tensor | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """content (rows, T, width), query (rows, P, width) -> both after attention, of the same shapes.

        at (rows, P): the places in the row at which the queries stand; None: one at each, P = T. Who sees whom differs
        by the diagonal: a token's content sees itself, its query must not. A query that sees nothing gets zeros.
        """
        keys, values = self._keys(content if memory is None else torch.cat([memory, content], 1))
        return (
            self._read(self.q_proj(content), keys, values, distances, content_mask, segments, None),
            self._read(self.q_proj(query), keys, values, distances, query_mask, segments, at),
        )

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (rows, S, width) -> 2 x (rows, heads, S, head_dim)
        kv = self.project(x).unflatten(-1, (2, self.heads, self.head_dim))
        return kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)

    def _read(
        self,
        projected: Tensor,
        keys: Tensor,
        values: Tensor,
        distances: Tensor,
        mask: Lowered,
        segments: Tensor | None,
        at: Tensor | None,
    ) -> Tensor:
        q = projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)  # (rows, heads, P, head_dim)
        S, columns = keys.shape[2], len(distances)
        T = columns - S  # tokens of the row: the last of the keys
        if T < 1 or (at is None and q.shape[2] != T):
            raise HanlinError(
                f"{q.shape[2]} queries over {S} keys need a table of {S + q.shape[2]} distances; it has {columns}."
            )
        place = None if at is None else at[:, None, :, None]  # (rows, 1, P, 1)

        r = self.r_proj(distances.to(q.dtype)).unflatten(-1, (self.heads, self.head_dim)).transpose(0, 1)
        by_distance = (q + _of_head(self.r_r_bias, q)) @ r.transpose(1, 2)  # (rows, heads, P, S + T)
        if place is None:
            scores = relative_shift(by_distance, S)
        else:
            column = T - place + torch.arange(S, device=q.device)
            scores = by_distance.gather(-1, column.expand(-1, self.heads, -1, -1))
        if segments is not None:
            scores = scores + self._segment_scores(q, segments, S, at)
        scores = scores * self.scale

        bias, blind = _dense(mask, T, q), mask.blind  # (rows or 1, 1, T, T), (rows or 1, 1, T or 1, 1)
        if bias is not None:
            if blind is not None and S > T:  # whoever has a memory sees that, and not the key that keeps softmax finite
                bias = bias.masked_fill(blind, float("-inf"))
            bias = bias if place is None else _at(bias, place, T)
            scores = scores + F.pad(bias, (S - T, 0))
        content = q + _of_head(self.r_w_bias, q)
        out = F.scaled_dot_product_attention(content, keys, values, scores, scale=self.scale)
        if blind is not None and S == T:
            out = out.masked_fill(blind if place is None else _at(blind, place, T), 0.0)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _segment_scores(self, q: Tensor, segments: Tensor, keys: int, at: Tensor | None) -> Tensor:
        """(rows, heads, P, S): of the vector for one segment or of the one for two."""
        if self.seg_embed is None or self.r_s_bias is None:
            raise HanlinError("Segments were given to an attention that was built without them (`segments=False`).")
        kinds = (q + _of_head(self.r_s_bias, q)) @ self.seg_embed.to(q.dtype).permute(1, 2, 0)  # (rows, heads, P, 2)
        of_query = segments if at is None else segments.gather(1, at)
        of_key = F.pad(segments, (keys - segments.shape[1], 0))
        differ = (of_query[:, :, None] != of_key[:, None, :])[:, None]  # (rows, 1, P, S)
        return torch.where(differ, kinds[..., 1:], kinds[..., :1])


def _dense(mask: Lowered, length: int, like: Tensor) -> Tensor | None:
    """The mask as a matrix added to the scores, (rows or 1, 1, T, T); None: everyone sees everything."""
    if mask.bias is not None or not mask.causal:
        return mask.bias
    return torch.full((1, 1, length, length), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)


def _at(table: Tensor, place: Tensor, length: int) -> Tensor:
    """The rows of the queries: table (rows or 1, 1, T or 1, n), place (rows, 1, P, 1) -> (rows, 1, P, n)."""
    table = table.expand(len(place), 1, length, table.shape[-1])
    return table.gather(2, place.expand(-1, -1, -1, table.shape[-1]))


def _of_head(bias: Tensor, like: Tensor) -> Tensor:  # (heads, head_dim) -> (heads, 1, head_dim)
    return bias.to(like.dtype)[:, None]
