"""Token losses: tensors in, un-normalised sums out, no model inside. The trainer divides once, by what the objective
counted over the whole optimizer step, so accumulation, packing and sharding cannot change the result.

Beside this file: `nn.earth_mover`, `nn.distillation`, `nn.contrastive`, `nn.multitask`; `nn.chunked_head` takes any of
them through an output head.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.kernels.cross_entropy import cross_entropy
from hanlin.nn.chunked_head import Head, slope_through_head

IGNORE = -100  # a target that carries no loss (the value transformers uses too)


def count_targets(targets: Tensor) -> int:
    """How many targets carry loss: the denominator of a token-mean."""
    return int((targets != IGNORE).sum())


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sum over tokens of -log softmax(z)[target], z = softcap(scale * (hidden W^T + bias)), never holding all logits.

    hidden (..., width), weight (vocabulary, width) any float dtype (cast to hidden's), targets (...) with `IGNORE`
    where there is no loss, bias (vocabulary,) -> fp32 scalar (fp64 for fp64 hidden).

    label_smoothing e: the target is 1 - e of itself and e of the uniform distribution (arXiv:1512.00567, section 7).
    z_loss: times log(sum exp z)^2 is added, which keeps the normaliser near 1 (PaLM, arXiv:2204.02311, section 5).
    softcap c: c * tanh(x / c) (Gemma 2). chunk: tokens at a time, by default `nn.chunked_head.rows_per_chunk`.
    """
    if not 0 <= label_smoothing < 1:
        raise HanlinError(f"`label_smoothing` is {label_smoothing}; it must be at least 0 and below 1.")
    if not z_loss >= 0:
        raise HanlinError(f"`z_loss` is {z_loss}; it must not be negative.")
    if targets.shape != hidden.shape[:-1]:
        raise HanlinError(f"Targets {list(targets.shape)} do not fit hidden states {list(hidden.shape)}.")
    slope = partial(_cross_entropy_slope, smoothing=label_smoothing, z_loss=z_loss)
    head = Head(weight, bias, softcap, scale)
    narrow = partial(cross_entropy, smoothing=label_smoothing, z_loss=z_loss)
    return slope_through_head(hidden, head, slope, targets, keep=targets != IGNORE, chunk=chunk, narrow=narrow)


def _cross_entropy_slope(
    z: Tensor, target: Tensor, *, wanted: bool, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor | None]:
    """With L = log sum exp z: sum of L - (1 - e) z_y - e mean(z) + c L^2, slope p (1 + 2 c L) - (1 - e) [y] - e / V.
    In the memory of z (n, vocabulary)."""
    target = target[:, None]
    shift = z.amax(-1, keepdim=True)
    at_target = z.gather(-1, target)
    mean = z.mean(-1, keepdim=True) if smoothing else None
    probability = z.sub_(shift).exp_()
    norm = probability.sum(-1, keepdim=True)
    log_norm = norm.log() + shift
    cost = log_norm - at_target
    if mean is not None:
        cost += smoothing * (at_target - mean)
    if z_loss:
        cost += z_loss * log_norm.square()
    if not wanted:
        return cost.sum(), None
    slope = probability.mul_((1 + 2 * z_loss * log_norm) / norm) if z_loss else probability.div_(norm)
    slope.scatter_add_(-1, target, torch.full_like(at_target, smoothing - 1.0))
    if smoothing:
        slope.sub_(smoothing / z.shape[-1])
    return cost.sum(), slope


def linear_dft(hidden: Tensor, head: Head, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """Sum over tokens of -sg(p) log p, p = softmax(z)[target]: dynamic fine-tuning (DFT, arXiv:2508.05629).

    hidden (..., width), targets (...) with `IGNORE`; z, chunk and the result as in `linear_cross_entropy`. sg: the
    factor p carries no gradient, so the slope is p (softmax(z) - [target]).
    """
    return slope_through_head(hidden, head, _dft_slope, targets, keep=targets != IGNORE, chunk=chunk)


def _dft_slope(z: Tensor, target: Tensor, *, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """In the memory of z (n, vocabulary)."""
    target = target[:, None]
    log_p = z.sub_(z.logsumexp(-1, keepdim=True))
    at_target = log_p.gather(-1, target)
    weight = at_target.exp()
    cost = -(weight * at_target).sum()
    if not wanted:
        return cost, None
    return cost, log_p.exp_().mul_(weight).scatter_add_(-1, target, -weight)


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits)[id] of each token: logits (..., vocabulary), ids (...) -> (...) fp32."""
    wide = logits.float()
    return wide.gather(-1, ids[..., None]).squeeze(-1) - wide.logsumexp(-1)


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, *, positive_weight: float | Tensor = 1.0, keep: Tensor | None = None
) -> Tensor:
    """Sum of -[w y log sigmoid(x) + (1 - y) log(1 - sigmoid(x))] over independent yes-or-no questions.

    logits x (...), targets y (...) in [0, 1], soft ones too; positive_weight w: broadcast over (...), above 1 where a
    missed yes costs more; keep (...) bool: which count -> fp32 scalar (fp64 for fp64). Finite for any finite logit.
    """
    if targets.shape != logits.shape:
        raise HanlinError(f"Targets {list(targets.shape)} do not fit logits {list(logits.shape)}.")
    x = logits if logits.dtype == torch.float64 else logits.float()
    y = targets.to(x.dtype)
    cost = -(positive_weight * y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x))
    return (cost if keep is None else cost[keep]).sum()
