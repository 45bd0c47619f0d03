"""Multi-head attention with grouped queries (GQA, arXiv:2305.13245).

    softmax(softcap(scale * q k^T) + bias + mask) v      per head; `heads / kv_heads` query heads share one key head

What differs between models is said by values: `Scores` (scale, mask, soft-cap, sinks, position bias), rotary tables,
norms of queries and keys. With a cache the keys and values of this step are handed to it and *it* attends
(`Cache.attend`), so that a contiguous, a paged or a tiered cache can each read its own layout. Without a cache it is
`attend`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.nn.block_attention import block_attention, worth_it
from hanlin.nn.linear import Linear, PackedLinear
from hanlin.nn.mask_lowering import Lowered
from hanlin.nn.masks import Causal, Mask
from hanlin.nn.norms import rms_norm
from hanlin.nn.rope import rotate

PositionBias = Callable[[Tensor, Tensor], Tensor]  # (rows, Tq), (rows, Tk) positions -> (rows or 1, heads, Tq, Tk)
QueryScale = Callable[[Tensor], Tensor]  # (rows, T) positions -> (rows, T) factors
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Scores:
    """How a query scores a key. scale: of q k^T; softcap c: c * tanh(s / c) (Gemma 2, arXiv:2408.00118); sinks
    (heads,): a logit that joins the softmax and gives nothing (gpt-oss; arXiv:2309.17453); bias: of positions, added
    after."""

    scale: float
    mask: Mask
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: PositionBias | None = None

    @property
    def plain(self) -> bool:
        """Whether a fused kernel computes it: scale, mask and bias alone."""
        return self.softcap is None and self.sinks is None


class CrossReader(Protocol):
    """Kept keys and values of what an encoder read, for one forward pass."""

    def __call__(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """q (rows, T, heads, D): each token's query attends to the whole source of its sequence -> like q."""
        ...


class Cache(Protocol):
    """The keys and values of what was already read, for one forward pass over some rows.

    An implementation is a *step*: it knows which sequence each row of the batch continues and where the new tokens go.
    """

    @property
    def positions(self) -> Tensor:
        """(rows, T): the position in its sequence of each new token of this step. A row may hold the tokens of several
        sequences, one behind the other."""
        ...

    @property
    def lengths(self) -> Tensor:
        """(rows, T): how many tokens the sequence of each new token holds after this step."""
        ...

    @property
    def source(self) -> "CrossReader | None":
        """What the sequences of this step read of an encoder; None: the model has none, or gets `source` itself."""
        ...

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores, *, value_dim: int | None = None
    ) -> Tensor:
        """Write k, v (rows, T, kv_heads, D) at `positions`, then let q (rows, T, heads, D) attend to all that its
        sequence holds and its mask shows. v None: the values are the first `value_dim` numbers of the keys. Returns
        (rows, T, heads, width of a value)."""
        ...


class Attention(PackedLinear):
    """Self-attention of one layer. The named projections keep the Hugging Face names and share one buffer.

    qk_norm: makes the norm of a head's width that queries and keys get before they turn; l2_norm: the epsilon of one
    without a weight, after (Llama 4). bias: the layer's position bias. query_scale: a factor for each query by its
    position.
    """

    packed = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
        l2_norm: float | None = None,
        mask: Mask | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        bias: PositionBias | None = None,
        query_scale: QueryScale | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.layer = heads, kv_heads, head_dim, layer
        self.l2_norm, self.query_scale = l2_norm, query_scale
        self.q_proj = Linear(width, heads * head_dim, bias=qkv_bias)
        self.k_proj = Linear(width, kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = Linear(width, kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = Linear(heads * head_dim, width, bias=output_bias)
        self.q_norm = None if qk_norm is None else qk_norm(head_dim)
        self.k_norm = None if qk_norm is None else qk_norm(head_dim)
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None
        self.scores = Scores(head_dim**-0.5 if scale is None else scale, mask or Causal(), softcap, None, bias)
        self.pack()

    def forward(
        self,
        x: Tensor,
        rope: Tables | None,
        mask: Lowered | Mask | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """x (rows, T, width) -> (rows, T, width). rope: tables of `nn.rope`, or None where nothing turns. mask: this
        layer's, lowered, the position bias added. With a cache, which lowers masks itself: None, or a `Mask` over
        indices of the whole sequence in the place of this layer's own. positions: for `query_scale`."""
        rows, length, _ = x.shape
        H, K, D = self.heads, self.kv_heads, self.head_dim
        qkv = self.project(x).view(rows, length, H + 2 * K, D)
        if self.q_norm is None or self.k_norm is None:
            qk, v = qkv.split([H + K, K], dim=2)
            q, k = (qk if rope is None else rotate(qk, *rope)).split([H, K], dim=2)  # (rows, T, heads, D)
        else:
            q, k, v = qkv.split([H, K, K], dim=2)
            q, k = self.q_norm(q), self.k_norm(k)
            if rope is not None:
                q, k = rotate(q, *rope), rotate(k, *rope)
        if self.l2_norm is not None:
            q, k = rms_norm(q, None, self.l2_norm), rms_norm(k, None, self.l2_norm)
        if self.query_scale is not None and positions is not None:
            if q.dtype == torch.float64:  # then the factors are, too
                positions = positions.double()
            q = q * self.query_scale(positions).to(q.dtype)[:, :, None, None]
        scores = self.scores if self.sinks is None else replace(self.scores, sinks=self.sinks)
        if cache is not None:
            if isinstance(mask, Mask):
                scores = replace(scores, mask=mask)
            out = cache.attend(self.layer, q, k, v, scores)
        else:
            assert isinstance(mask, Lowered)
            out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scores, mask).transpose(1, 2)
        return self.o_proj(out.reshape(rows, length, H * D))


class CrossAttention(PackedLinear):
    """Queries from one sequence, keys and values from another (arXiv:1706.03762, section 3.2.3)."""

    packed = ("k_proj", "v_proj")

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, *,
        qkv_bias: bool = False, output_bias: bool = False, scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = Linear(width, heads * head_dim, bias=qkv_bias)
        self.k_proj = Linear(width, kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = Linear(width, kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = Linear(heads * head_dim, width, bias=output_bias)
        self.scale = head_dim**-0.5 if scale is None else scale
        self.pack()

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source (rows, S, width) -> both (rows, S, kv_heads, D)."""
        kv = self.project(source).view(*source.shape[:2], 2 * self.kv_heads, self.head_dim)
        k, v = kv.split([self.kv_heads, self.kv_heads], dim=2)
        return k, v

    def read(self, x: Tensor, reader: CrossReader, layer: int) -> Tensor:
        """The same over keys and values that were kept: x (rows, T, width)."""
        q = self.q_proj(x).view(*x.shape[:2], self.heads, self.head_dim)
        return self.o_proj(reader(layer, q, self.scale).flatten(2))

    def forward(self, x: Tensor, source: Tensor, mask: Lowered | None = None) -> Tensor:
        """x (rows, T, width), source (rows, S, width); mask: which of the source counts, None: all of it."""
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, self.heads, self.head_dim)
        k, v = self.keys_and_values(source)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None if mask is None else mask.bias,
            scale=self.scale, enable_gqa=self.heads != self.kv_heads,
        )  # fmt: skip
        if mask is not None and mask.blind is not None:
            out = out.masked_fill(mask.blind, 0.0)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, self.heads * self.head_dim))


def attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores, mask: Lowered) -> Tensor:
    """Self-attention by the fastest exact form: q (rows, heads, T, D), k and v (rows, kv_heads, T, D) -> like q.

    mask: `scores.mask` lowered, with the position bias added to it.
    """
    learns = mask.bias is not None and mask.bias.requires_grad  # a learnt position bias wants its gradient
    if not scores.plain:
        out = plain_attention(q, k, v, scores, _as_bias(mask, q))
    elif worth_it(q) and not learns:
        out = block_attention(q, k, v, mask.bias, scores.scale, causal=mask.causal)
    else:
        flag, grouped = mask.causal and mask.bias is None, q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, mask.bias, is_causal=flag, scale=scores.scale, enable_gqa=grouped
        )  # fmt: skip
    return out if mask.blind is None else out.masked_fill(mask.blind, 0.0)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores, bias: Tensor | None) -> Tensor:
    """The equation as it stands, with soft-cap and sinks: q (rows, heads, T, D), k and v (rows, kv_heads, S, ...),
    bias (rows or 1, heads or 1, T, S) -> (rows, heads, T, width of a value). Softmax in fp32 (fp64 for fp64)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    logits = (q @ k.transpose(-1, -2)) * scores.scale  # (rows, heads, T, S)
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    if bias is not None:
        logits = logits + bias
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if scores.sinks is None:
        return wide.softmax(-1).to(v.dtype) @ v
    sink = scores.sinks.to(wide.dtype)[None, :, None, None].expand(*wide.shape[:3], 1)
    return torch.cat([wide, sink], -1).softmax(-1)[..., :-1].to(v.dtype) @ v


def attend_packed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Few queries over many keys: the query heads of one key head stand as rows of one matrix, so that each key is read
    once and not once a query head (one token, 12 over 4 heads, 192 keys, bf16: 24 us against SDPA's grouped 116 us).

    q (rows, T, heads, D), k and v (rows, kv_heads, L, ...), bias (rows or 1, T, L) or None -> (rows, T, heads, width of
    v).
    """
    rows, length, heads, D = q.shape
    K, G = k.shape[1], q.shape[2] // k.shape[1]
    grouped = q.view(rows, length, K, G, D).permute(0, 2, 3, 1, 4).reshape(rows, K, G * length, D)
    if bias is not None:
        bias = bias[:, None, None].expand(-1, 1, G, -1, -1).reshape(len(bias), 1, G * length, -1)
    out = F.scaled_dot_product_attention(grouped, k, v, bias, scale=scale)
    return out.view(rows, K, G, length, -1).permute(0, 3, 1, 2, 4).reshape(rows, length, heads, out.shape[-1])


def _as_bias(mask: Lowered, q: Tensor) -> Tensor | None:
    """The whole of a lowered mask as something to add to scores."""
    if mask.bias is not None or not mask.causal:
        return mask.bias
    length = q.shape[2]
    return torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)[None, None]
