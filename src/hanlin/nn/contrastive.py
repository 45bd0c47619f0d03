"""Contrastive losses: what belongs together lies close, the rest of the batch apart. Sums over anchors.

InfoNCE   -log( exp(s(q_i, k_i) / T) / sum_j exp(s(q_i, k_j) / T) )      s: cosine      (arXiv:1807.03748; CLIP's
          symmetric form, arXiv:2103.00020, is the mean of both directions)
SimCSE    InfoNCE between two readings of one sentence, or a sentence, its entailment and its contradiction
          (arXiv:2104.08821, eq. 1 and 5)
triplet   max(0, d(a, p) - d(a, n) + margin)                             (FaceNet, arXiv:1503.03832)
pairs     y d^2 + (1 - y) max(0, margin - d)^2                           (Hadsell, Chopra and LeCun, CVPR 2006)
ranking   max(0, margin - (better - worse))
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError

Distance = Literal["euclidean", "cosine"]


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    positives: Tensor | None = None,
    symmetric: bool = False,
    normalise: bool = True,
) -> Tensor:
    """Each query against every key of the batch -> fp32 scalar (fp64 for fp64 queries).

    queries (n, width), keys (m, width); positives (n,) the key that belongs to each query, by default its own number;
    keys beyond n are negatives for all. temperature: a number, or a tensor () that is learnt. symmetric: half of it and
    half of every key against all queries (n keys, each with its own query). normalise=False: s is the dot product.
    """
    _check_pair(queries, keys, "queries", "keys", same_rows=False)
    n, m = len(queries), len(keys)
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise HanlinError(f"`temperature` is {temperature}; it must be positive.")
    if symmetric and (m != n or positives is not None):
        raise HanlinError(
            f"The symmetric loss pairs each query with the key of its number; here are {n} queries and {m} keys"
            f"{'' if positives is None else ' with `positives`'}."
        )
    if positives is None:
        if m < n:
            raise HanlinError(f"{n} queries need at least {n} keys, the first of which are theirs; there are {m}.")
        positives = torch.arange(n, device=queries.device)
    elif positives.shape != (n,):
        raise HanlinError(f"`positives` {list(positives.shape)} must name one key for each of the {n} queries.")
    q, k = (F.normalize(_wide(x), dim=-1) if normalise else _wide(x) for x in (queries, keys))
    scores = q @ k.T / temperature  # (n, m)
    total = _pick(scores, positives)
    return (total + _pick(scores.T, positives)) / 2 if symmetric else total


def simcse(
    first: Tensor, second: Tensor, negatives: Tensor | None = None, *, temperature: float | Tensor = 0.05
) -> Tensor:
    """Sentences read twice with different dropout, first and second (n, width); or sentences, what follows from them
    and what contradicts them, negatives (n, width). Every other sentence of the batch is a negative too."""
    _check_pair(first, second, "first", "second")
    if negatives is None:
        return info_nce(first, second, temperature=temperature)
    _check_pair(first, negatives, "first", "negatives", same_rows=False)
    return info_nce(first, torch.cat([second, negatives]), temperature=temperature)


def triplet(
    anchor: Tensor, positive: Tensor, negative: Tensor, *, margin: float = 1.0, distance: Distance = "euclidean"
) -> Tensor:
    """Sum of max(0, d(anchor, positive) - d(anchor, negative) + margin): (n, width) each."""
    _check_pair(anchor, positive, "anchor", "positive")
    _check_pair(anchor, negative, "anchor", "negative")
    near, far = _distance(anchor, positive, distance), _distance(anchor, negative, distance)
    return (near - far + margin).clamp_min(0).sum()


def pair_margin(
    first: Tensor, second: Tensor, same: Tensor, *, margin: float = 1.0, distance: Distance = "euclidean"
) -> Tensor:
    """Sum of d^2 where same (n,) is 1 and of max(0, margin - d)^2 where it is 0: first and second (n, width)."""
    _check_pair(first, second, "first", "second")
    if same.shape != first.shape[:1]:
        raise HanlinError(f"`same` {list(same.shape)} must have one number for each of the {len(first)} pairs.")
    d = _distance(first, second, distance)
    y = same.to(d.dtype)
    return (y * d.square() + (1 - y) * (margin - d).clamp_min(0).square()).sum()


def margin_ranking(better: Tensor, worse: Tensor, *, margin: float = 0.0) -> Tensor:
    """Sum of max(0, margin - (better - worse)): scores (...) each."""
    if better.shape != worse.shape:
        raise HanlinError(f"Scores {list(better.shape)} and {list(worse.shape)} must be pairs.")
    return (margin - (_wide(better) - _wide(worse))).clamp_min(0).sum()


def _pick(scores: Tensor, positives: Tensor) -> Tensor:
    return (scores.logsumexp(-1) - scores.gather(-1, positives[:, None])[:, 0]).sum()


def _distance(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    a, b = _wide(a), _wide(b)
    if kind == "cosine":
        return 1 - (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)
    if kind != "euclidean":
        raise HanlinError(f'`distance` is {kind!r}; it is "euclidean" or "cosine".')
    return torch.linalg.vector_norm(a - b, dim=-1)  # its slope at 0 is 0


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_pair(a: Tensor, b: Tensor, a_name: str, b_name: str, *, same_rows: bool = True) -> None:
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and (not same_rows or len(a) == len(b))
    if not fits:
        raise HanlinError(f"`{a_name}` {list(a.shape)} and `{b_name}` {list(b.shape)} must be vectors of one width.")
