"""Linear attention (arXiv:2006.16236): the softmax's e^(q k) becomes phi(q) phi(k), so the sum over keys can go first.

    out_i = phi(q_i) S_i / (phi(q_i) z_i)        S_i = sum phi(k_j) v_j^T,   z_i = sum phi(k_j)   over visible j

All pairs are never formed: time and memory grow with T, not T^2. Causal sums run in chunks: within one all pairs, from
those before it the state (S, z). One token at a time that is a recurrent network whose memory never grows:

    S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.linear import Linear, PackedLinear
from hanlin.nn.masks import And, Bidirectional, Causal, Mask, Padding, SameDocument
from hanlin.nn.wide import wide

FeatureMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LinearState:
    """What a row remembers: s (rows, heads, features, value width) and z (rows, heads, features), fp32 or fp64."""

    s: Tensor
    z: Tensor


class LinearAttention(PackedLinear):
    """Multi-head attention with a feature map in the place of the softmax. feature: a name of `FEATURE_MAPS`."""

    packed = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self, width: int, heads: int, head_dim: int, *, feature: str = "elu+1", bias: bool = False, chunk: int = 64
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.chunk = heads, head_dim, chunk
        self.feature = feature_map(feature)
        self.q_proj = Linear(width, heads * head_dim, bias=bias)
        self.k_proj = Linear(width, heads * head_dim, bias=bias)
        self.v_proj = Linear(width, heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, width, bias=bias)
        self.pack()

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """x (rows, T, width) -> like x. mask: see `linear_attention`."""
        return self._out(linear_attention(*self._qkv(x), mask, feature=self.feature, chunk=self.chunk))

    def step(self, x: Tensor, state: LinearState | None) -> tuple[Tensor, LinearState]:
        """One more token a row: x (rows, 1, width) and what came before (None: nothing) -> (like x, the new state)."""
        q, k, v = (part[:, :, 0] for part in self._qkv(x))
        out, state = recurrent_step(q, k, v, state, feature=self.feature)
        return self._out(out[:, :, None]), state

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        split = self.project(x).unflatten(-1, (3, self.heads, self.head_dim))  # (rows, T, 3, heads, D)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _out(self, x: Tensor) -> Tensor:  # (rows, heads, T, D) -> (rows, T, width)
        return self.o_proj(x.transpose(1, 2).flatten(2))


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, feature: str | FeatureMap = "elu+1", chunk: int = 64
) -> Tensor:
    """q and k (rows, heads, T, D), v (rows, heads, T, M) -> (rows, heads, T, M); sums in fp32 (fp64 for fp64).

    mask: `Causal` or `Bidirectional`, `&` `Padding` and `SameDocument` (documents that stand one after another). Others
    need each pair by itself, which is what this attention saves: they are refused. A query that sees no key, or none
    that its features touch, gets 0.
    """
    causal, valid, documents = _parts(mask)
    valid, documents = _fit(valid, k.shape[2], "Padding"), _fit(documents, k.shape[2], "SameDocument")
    phi = feature_map(feature) if isinstance(feature, str) else feature
    qf, kf, values = phi(wide(q)), phi(wide(k)), wide(v)
    if valid is not None:
        kf = kf * valid[:, None, :, None]
    if causal:
        s, z = _causal_sums(qf, kf, values, documents, chunk)
    elif documents is None:
        state = kf.transpose(-1, -2) @ values  # (rows, heads, features, M)
        s, z = qf @ state, (qf @ kf.sum(2)[..., None]).squeeze(-1)
    else:  # what comes before with itself, and what comes after without, read from the end
        s, z = _causal_sums(qf, kf, values, documents, chunk)
        turned = (x.flip(2) for x in (qf, kf, values))
        after = _causal_sums(*turned, documents.flip(1), chunk, strict=True)
        s, z = s + after[0].flip(2), z + after[1].flip(2)
    return _divide(s, z).to(v.dtype)


def recurrent_step(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState | None, *, feature: str | FeatureMap = "elu+1"
) -> tuple[Tensor, LinearState]:
    """One token: q and k (rows, heads, D), v (rows, heads, M), state of the tokens before (None: there are none)
    -> (rows, heads, M) and the new state. T of them equal `linear_attention` under `Causal`."""
    phi = feature_map(feature) if isinstance(feature, str) else feature
    qf, kf, value = phi(wide(q)), phi(wide(k)), wide(v)
    s, z = kf[..., :, None] * value[..., None, :], kf
    if state is not None:
        s, z = state.s + s, state.z + z
    out = (qf[..., None, :] @ s).squeeze(-2)
    return _divide(out, (qf * z).sum(-1)).to(v.dtype), LinearState(s, z)


def linear_state(k: Tensor, v: Tensor, *, feature: str | FeatureMap = "elu+1") -> LinearState:
    """The state after a whole prompt at once: k (rows, heads, T, D), v (rows, heads, T, M)."""
    phi = feature_map(feature) if isinstance(feature, str) else feature
    kf = phi(wide(k))
    return LinearState(kf.transpose(-1, -2) @ wide(v), kf.sum(2))


def feature_map(name: str) -> FeatureMap:
    """The phi of a name; none may be negative, or the denominator could pass through 0."""
    if name not in FEATURE_MAPS:
        raise HanlinError(f"There is no feature map {name!r}. Known are: {', '.join(FEATURE_MAPS)}.")
    return FEATURE_MAPS[name]


def elu_plus_one(x: Tensor) -> Tensor:
    """x + 1 above 0, e^x below: positive everywhere, and with a gradient everywhere (arXiv:2006.16236, eq. 7)."""
    return F.elu(x) + 1


def _causal_sums(
    qf: Tensor, kf: Tensor, v: Tensor, documents: Tensor | None, chunk: int, *, strict: bool = False
) -> tuple[Tensor, Tensor]:
    """Numerator (rows, heads, T, M) and denominator (rows, heads, T) over keys up to the query (strict: before it).

    The state belongs to one document, the last of the chunk before: queries of another one do not read it.
    """
    rows, heads, length, features = kf.shape
    s = kf.new_zeros(rows, heads, features, v.shape[-1])
    z = kf.new_zeros(rows, heads, features)
    held = None if documents is None else documents[:, 0]
    outputs, norms = [], []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        q, k, value = qf[:, :, part], kf[:, :, part], v[:, :, part]
        pairs = (q @ k.transpose(-1, -2)).tril(-1 if strict else 0)  # (rows, heads, C, C)
        reading, kept = q, k
        if documents is not None and held is not None:
            ids = documents[:, part]
            pairs = pairs * (ids[:, :, None] == ids[:, None, :])[:, None]
            last = ids[:, -1]
            reading = q * (ids == held[:, None])[:, None, :, None]
            kept = k * (ids == last[:, None])[:, None, :, None]
            stays = (last == held)[:, None, None]
            held = last
        outputs.append(pairs @ value + reading @ s)
        norms.append(pairs.sum(-1) + (reading @ z[..., None]).squeeze(-1))
        if documents is not None:
            s, z = s * stays[..., None], z * stays
        s, z = s + kept.transpose(-1, -2) @ value, z + kept.sum(2)
    return torch.cat(outputs, 2), torch.cat(norms, 2)


def _divide(s: Tensor, z: Tensor) -> Tensor:
    return s / torch.where(z == 0, 1, z)[..., None]  # nothing seen: s is 0 as well


def _parts(mask: Mask) -> tuple[bool, Tensor | None, Tensor | None]:
    """(causal, which keys are real (rows, T), documents (rows, T)); `HanlinError` names what has no linear form."""
    causal, valid, documents = False, None, None
    for part in mask.parts if isinstance(mask, And) else (mask,):
        if isinstance(part, Causal):
            causal = True
        elif isinstance(part, Padding) and valid is None:
            valid = part.valid
        elif isinstance(part, SameDocument) and documents is None:
            documents = part.ids
        elif not isinstance(part, Bidirectional):
            raise HanlinError(
                f"Linear attention has no form for the mask {part}: it sums over keys before it knows the query. "
                "It takes Causal or Bidirectional, and with `&` one Padding and one SameDocument."
            )
    if documents is not None:
        _check_contiguous(documents)
    return causal, valid, documents


def _check_contiguous(documents: Tensor) -> None:
    pieces, distinct = (ids.diff(dim=1).ne(0).sum(1) for ids in (documents, documents.sort(1).values))
    if not torch.equal(pieces, distinct):
        raise HanlinError(
            "Linear attention needs documents that stand one after another; in row "
            f"{int((pieces != distinct).int().argmax())} a document continues behind another one."
        )


def _fit(table: Tensor | None, length: int, what: str) -> Tensor | None:
    """The first `length` tokens of what a mask says of each."""
    if table is not None and table.shape[1] < length:
        raise HanlinError(f"{what} speaks of {table.shape[1]} tokens; the row has {length}.")
    return None if table is None else table[:, :length]


FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu+1": elu_plus_one,
    "relu": F.relu,
    "softplus": F.softplus,
    "exp": torch.exp,
}
