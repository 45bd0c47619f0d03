"""What a token is drawn from, and the draw: pure functions over logits (rows, vocabulary).

top-k, top-p (arXiv:1904.09751) and min-p (arXiv:2407.01082) are floors: tokens whose logit lies below cannot be drawn,
and a tie with the last token kept is kept too. Typical sampling (arXiv:2202.00666) keeps a ring around the entropy. All
of them are written so that a row's result never depends on the other rows, to the last bit: sums run over blocks of
fixed size, and a look at fewer tokens finds the same as a look at all.

A draw is inverse transform sampling: one uniform number against the cumulative probabilities in the order of the
vocabulary. The number is a pure function of a seed and of the position of the token, so that a run which is speculated,
preempted or resumed draws the same.
"""

import hashlib
import math

import torch
from torch import Tensor

NUCLEUS = (256, 4096, 32768)  # a mass is looked for among so many tokens first; sorting 150k takes 15 ms
BLOCK = 512  # a cumulative fp64 sum over 150k tokens takes 1.8 ms; over their blocks, 0.02


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - max) / temperature (rows, 1): the same distribution as without the shift, and nothing overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature.clamp_min(1e-30)


def top_k_floor(ordered: Tensor, k: Tensor) -> Tensor:
    """The k-th largest logit of each row: ordered (rows, W) descending, W ≥ k; k (rows, 1), 0 is off -> (rows, 1)."""
    kth = ordered.gather(-1, (k - 1).clamp(0, ordered.shape[-1] - 1))
    return kth.masked_fill(k == 0, -math.inf)


def top_p_floor(logits: Tensor, p: Tensor) -> Tensor:
    """The lowest logit of the nucleus: the fewest likeliest tokens that together reach p.

    logits (rows, V), p (rows, 1) fp64, 1 is off -> (rows, 1).
    """
    return _floor_of_mass(logits, (logits - logits.amax(-1, keepdim=True)).exp(), p)


def min_p_floor(logits: Tensor, p: Tensor) -> Tensor:
    """p times the top probability, as a logit: p (rows, 1), 0 is off -> (rows, 1)."""
    return logits.amax(-1, keepdim=True) + p.log()


def drop_below(logits: Tensor, floor: Tensor) -> Tensor:
    return logits.masked_fill(logits < floor, -math.inf)


def drop_untypical(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the tokens whose surprise -log(probability) is nearest to its mean, the entropy, until they reach p.

    logits (rows, V), p (rows, 1) fp64, 1 is off -> (rows, V).
    """
    surprise = -logits.log_softmax(-1)
    chance = surprise.neg().exp()
    entropy = block_sums(torch.special.entr(chance)).sum(-1, keepdim=True).float()  # (rows, 1)
    near = (surprise - entropy).abs().neg()
    return logits.masked_fill(near < _floor_of_mass(near, chance, p), -math.inf)


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row: logits (rows, V), uniform (rows,) in [0, 1) fp64 -> tokens (rows,), whether the row was finite.

    Sums run in fp64 over blocks: first the block is found, then the token in it.
    """
    weight = (logits - logits.amax(-1, keepdim=True)).exp()  # (rows, V)
    sums = block_sums(weight)
    ends = sums.cumsum(-1)  # (rows, blocks)
    total = ends[:, -1:]
    point = _below(uniform[:, None] * total, total)
    block = torch.searchsorted(ends, point, right=True).clamp_max_(ends.shape[-1] - 1)  # (rows, 1)
    share = (point - (ends - sums).gather(-1, block)) / sums.gather(-1, block)  # of the block, 0 to 1
    size = logits.shape[-1]
    index = block * BLOCK + torch.arange(min(BLOCK, size), device=logits.device)  # (rows, tokens of a block)
    part = weight.gather(-1, index.clamp_max(size - 1)).double() * (index < size)
    inner = part.cumsum(-1)
    point = _below(share.clamp(0, 1) * inner[:, -1:], inner[:, -1:])
    token = block * BLOCK + torch.searchsorted(inner, point, right=True)
    return token[:, 0].clamp_max_(size - 1), total[:, 0].isfinite()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of 53 bits: that of the token before which `position` tokens stand."""
    digest = hashlib.blake2b(b"%d %d" % (seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def block_sums(values: Tensor) -> Tensor:
    """Sums over blocks of the vocabulary: (rows, V) fp32 -> (rows, ceil(V / BLOCK)) fp64."""
    whole = values.shape[-1] // BLOCK * BLOCK
    sums = values[:, :whole].unflatten(-1, (whole // BLOCK, BLOCK)).sum(-1)
    rest = values[:, whole:].sum(-1, keepdim=True)
    return torch.cat([sums, rest], -1).double()


def _floor_of_mass(score: Tensor, weight: Tensor, mass: Tensor) -> Tensor:
    """The lowest score (rows, 1) of the fewest tokens, best score first, that have this part of all weight; mass
    (rows, 1), 1 is off."""
    size = score.shape[-1]
    goal = mass * block_sums(weight).sum(-1, keepdim=True)
    for width in (*(w for w in NUCLEUS if w < size), size):
        ordered, index = score.topk(width)
        part = weight.gather(-1, index).double()
        inside = part.cumsum(-1) - part < goal  # what the better ones sum to
        if width == size or bool((~inside[:, -1:] | (mass >= 1)).all()):
            break
    last = inside.sum(-1, keepdim=True).sub_(1).clamp_min_(0)
    return ordered.gather(-1, last).masked_fill(mass >= 1, -math.inf)


def _below(point: Tensor, end: Tensor) -> Tensor:
    """Points that rounding has not put on the end: there no token is."""
    return torch.minimum(point, torch.nextafter(end, torch.zeros_like(end)))
