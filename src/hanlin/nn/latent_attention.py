"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3, arXiv:2412.19437).

    c = norm(W_DKV x)              the latent of a token: `kv_rank` numbers, from which every head's key and value come
    k_h = [W_UK_h c ; rope(W_KR x)]      v_h = W_UV_h c      q_h = [q_nope_h ; rope(q_rope_h)]

Only c and the one turned key part, which all heads share, stay in a cache. There a head needs no keys of its own, since

    q_nope_h . (W_UK_h c) = (W_UK_h^T q_nope_h) . c      and      sum_s p_s W_UV_h c_s = W_UV_h (sum_s p_s c_s)

so the key projection is absorbed by the query and the value projection by the output (section 2.1.3): attention with a
single key head, whose values are the first `kv_rank` numbers of its keys. Expanded, a pair of tokens costs a head
`nope + rope + value` multiplications; absorbed, `2 * kv_rank + rope`, but no key is ever built.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.nn.attention import Cache, Scores, Tables, attend
from hanlin.nn.linear import Linear
from hanlin.nn.masks import Causal, Lowered, Mask
from hanlin.nn.norms import RMSNorm
from hanlin.nn.rope import rotate


class LatentAttention(nn.Module):
    """Self-attention of one layer, under the Hugging Face names: `q_proj`, or `q_a_proj`, `q_a_layernorm`, `q_b_proj`
    where queries have a latent too; `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj`; `o_proj`.

    A head's query and key are `nope_dim` numbers without and `rope_dim` numbers with a position, its value `value_dim`.
    q_rank: width of the queries' latent, None: without one. bias: of the projections into a latent and of the output.
    scale: of the scores, (nope_dim + rope_dim)^-0.5 by default; with YaRN, that times its mscale squared.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        *,
        q_rank: int | None = None,
        bias: bool = False,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        mask: Mask | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_rank, self.layer = heads, kv_rank, layer
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        query_width = heads * (nope_dim + rope_dim)
        self.q_proj = Linear(width, query_width, bias=False) if q_rank is None else None
        self.q_a_proj = None if q_rank is None else Linear(width, q_rank, bias=bias)
        self.q_a_layernorm = None if q_rank is None else RMSNorm(q_rank, norm_eps)
        self.q_b_proj = None if q_rank is None else Linear(q_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(width, kv_rank + rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(kv_rank, norm_eps)
        # torch's own Linear: `nn.frozen` takes the weights of ours away, and the absorbed form reads these
        self.kv_b_proj = nn.Linear(kv_rank, heads * (nope_dim + value_dim), bias=False)
        self.o_proj = Linear(heads * value_dim, width, bias=bias)
        self.scores = Scores((nope_dim + rope_dim) ** -0.5 if scale is None else scale, mask or Causal())

    def forward(
        self, x: Tensor, rope: Tables, mask: Lowered | None, cache: Cache | None, positions: Tensor | None = None
    ) -> Tensor:
        """x (rows, T, width) -> (rows, T, width). rope: tables of `rope_dim` (`nn.rope`), in the pair layout of the
        weights. Exactly one of `mask` and `cache` is given: without a cache the expanded form, with one the absorbed.
        positions: as `Attention` takes them; nothing here depends on them but `rope`."""
        rows, length, _ = x.shape
        q_nope, q_rope = self._queries(x).split([self.nope_dim, self.rope_dim], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)  # (rows, T, kv_rank)
        q_rope, k_rope = rotate(q_rope, *rope), rotate(k_rope[:, :, None], *rope)  # (rows, T, heads | 1, rope_dim)
        if cache is not None:
            out = self._absorbed(q_nope, q_rope, latent, k_rope, cache)
        else:
            assert mask is not None
            out = self._expanded(q_nope, q_rope, latent, k_rope, mask)
        return self.o_proj(out.reshape(rows, length, self.heads * self.value_dim))

    def _queries(self, x: Tensor) -> Tensor:  # (rows, T, width) -> (rows, T, heads, nope_dim + rope_dim)
        if self.q_a_proj is not None and self.q_a_layernorm is not None and self.q_b_proj is not None:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        else:
            assert self.q_proj is not None
            q = self.q_proj(x)
        return q.view(*x.shape[:2], self.heads, -1)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Lowered) -> Tensor:
        """Every head's keys and values are built: (rows, T, heads, value_dim)."""
        kv = F.linear(latent, self.kv_b_proj.weight.to(latent.dtype)).unflatten(-1, (self.heads, -1))
        k_nope, v = kv.split([self.nope_dim, self.value_dim], dim=-1)
        q = torch.cat([q_nope, q_rope], -1)
        k = torch.cat([k_nope, k_rope.expand(-1, -1, self.heads, -1)], -1)
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.scores, mask).transpose(1, 2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, cache: Cache) -> Tensor:
        """One key head of `kv_rank + rope_dim` numbers, kept by the cache: (rows, T, heads, value_dim)."""
        up = self.kv_b_proj.weight.to(latent.dtype).view(self.heads, -1, self.kv_rank)
        up_k, up_v = up.split([self.nope_dim, self.value_dim], dim=1)  # (heads, nope_dim | value_dim, kv_rank)
        q = torch.cat([torch.einsum("rthn,hnc->rthc", q_nope, up_k), q_rope], -1)
        k = torch.cat([latent[:, :, None], k_rope], -1)  # (rows, T, 1, kv_rank + rope_dim)
        out = cache.attend(self.layer, q, k, None, self.scores, value_dim=self.kv_rank)  # (rows, T, heads, kv_rank)
        return torch.einsum("rthc,hvc->rthv", out, up_v)
