"""The policy-gradient family, PPO's critic and the correction for other engines' probabilities, as pure functions.

    r_t = exp(log p_t - log p_old_t)                          how much likelier the token has become
    PPO   -min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)     nothing to gain beyond the clip (arXiv:1707.06347)

Most other methods change one thing: where the ratio is taken (`level`), how it is bounded (`form`) or how tokens are
added up (`aggregate`). Tensors (n,) hold the trained tokens, flat; entry i is the token's own log-probability. What
comes back is a sum, to be divided by the step's denominators, and metrics as (sum, count).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hanlin.align.sequence_sums import Aggregate, mean_by_sequence, sum_by_sequence
from hanlin.align.sequence_sums import aggregate as add_up
from hanlin.core.errors import HanlinError
from hanlin.nn.wide import wide

Metrics = dict[str, tuple[float, float]]
Level = Literal["token", "sequence", "sequence_sum"]
Form = Literal["clip", "none", "cispo", "dppo"]

FARTHEST = 20.0  # a log-ratio is held within +-20, as verl and OpenRLHF do: exp(20) is finite, and hopeless anyway


def kl_estimate(logp: Tensor, logp_ref: Tensor, kind: Literal["k1", "k2", "k3", "k3+"]) -> Tensor:
    """Estimates of KL(policy || reference) from tokens that the policy drew (Schulman 2020): (n,), (n,) -> (n,).

    With d = log p - log p_ref: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d; "k3+" has k3's value and k2's gradient.
    k1 and k3 are unbiased as values. As losses, on policy, only k2 has the gradient of KL(policy || reference); that of
    k1 is zero in expectation, that of k3 is the gradient of KL(reference || policy).
    """
    apart = wide(logp) - wide(logp_ref).detach()
    if kind == "k1":
        return apart
    if kind == "k2":
        return apart.square() / 2
    third = _k3(-apart)
    if kind == "k3":
        return third
    if kind == "k3+":
        second = apart.square() / 2
        return third.detach() + second - second.detach()
    raise HanlinError(f"The estimator is {kind!r}; it must be k1, k2, k3 or k3+.")


def _k3(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, never negative; expm1 keeps its digits near 0."""
    x = x.clamp(-FARTHEST, FARTHEST)
    return torch.expm1(x) - x


def policy_loss(
    logp: Tensor,
    old: Tensor | None,
    advantages: Tensor,
    sequence: Tensor,
    count: int,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    level: Level = "token",
    form: Form = "clip",
    dual: float | None = None,
    weight: Tensor | None = None,
    aggregate: Aggregate = "token",
    length: float | None = None,
) -> tuple[Tensor, Metrics]:
    """The sum of what each trained token costs, with gradient to `logp` alone.

    logp, old, advantages, weight (n,); sequence (n,) int64 in 0 ... count - 1. old: log-probabilities under the policy
    that `advantages` are about; None means this policy: the ratio is exactly 1, the gradient that of -A log p.

    level  "token": a ratio a token. "sequence": exp of the mean log-ratio (GSPO, arXiv:2507.18071). "sequence_sum": of
           the answer's probability (RLOO, arXiv:2402.14740); with aggregate "sequence" one term an answer.
    form   "clip": PPO's. "none": -A log p, REINFORCE. "cispo": -sg(clip(r)) A log p, every token keeps a gradient
           (arXiv:2506.13585; a low of 1 is no lower bound). "dppo": -sg(r) A log p, without the tokens whose
           probability has moved by more than `clip` in the direction of the update (arXiv:2602.04879, total variation).
    dual   for A < 0, "clip" costs at most -dual A (dual-clip PPO, arXiv:1912.09729; above 1); "dppo" bounds r by it.
    weight what each token counts, without gradient: the correction of `rollout_weights`, for example.

    Metrics, over tokens: clip_low and clip_high (shares that lost their gradient to the clip: r too low for A < 0, too
    high for A > 0), dual_clip where asked for, ratio (mean), ratio_far (share outside [0.5, 2]), approx_kl (k3 of old
    against now), and ratio_peak: the largest ratio, counted once a call, so that over micro-batches and ranks it is the
    mean of their peaks.
    """
    low, high = clip
    if low < 0 or high < 0:
        raise HanlinError(f"clip is ({low}, {high}): how far below and above 1 the ratio may go; neither is negative.")
    if dual is not None and not dual > 1:
        raise HanlinError(f"dual is {dual}; it must be above 1 (3 is usual), or None.")
    logp = wide(logp)
    old = logp.detach() if old is None else old.detach().to(logp.dtype)
    advantages = advantages.detach().to(logp.dtype)
    ratio = _at_level(logp - old, level, sequence, count).clamp(-FARTHEST, FARTHEST).exp()
    if form not in FORMS:
        raise HanlinError(f"form is {form!r}; it must be one of {', '.join(FORMS)}.")
    cost = FORMS[form](Tokens(logp, old, ratio, advantages, clip, dual))
    if weight is not None:
        cost = cost * weight.detach()
    return add_up(cost, sequence, count, aggregate, length), _watch(logp - old, ratio, advantages, clip, form, dual)


@dataclass(frozen=True)
class Tokens:
    """What a form sees: tensors (n,), of which `logp` and through it `ratio` have a gradient, and the options."""

    logp: Tensor
    old: Tensor
    ratio: Tensor
    advantages: Tensor
    clip: tuple[float, float]
    dual: float | None

    def bounded(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(1 - self.clip[0], 1 + self.clip[1])


def _clip(t: Tokens) -> Tensor:
    cost = torch.maximum(-t.advantages * t.ratio, -t.advantages * t.bounded(t.ratio))
    if t.dual is None:
        return cost
    return torch.where(t.advantages < 0, torch.minimum(cost, -t.advantages * t.dual), cost)


def _none(t: Tokens) -> Tensor:
    return -t.advantages * t.logp


def _cispo(t: Tokens) -> Tensor:
    return -t.advantages * t.bounded(t.ratio.detach()) * t.logp


def _dppo(t: Tokens) -> Tensor:
    moved = t.logp.detach().exp() - t.old.exp()
    inside = torch.where(t.advantages > 0, moved <= t.clip[1], moved >= -t.clip[0])
    return -t.advantages * t.ratio.detach().clamp_max(math.inf if t.dual is None else t.dual) * t.logp * inside


FORMS: dict[str, Callable[[Tokens], Tensor]] = {"clip": _clip, "none": _none, "cispo": _cispo, "dppo": _dppo}


def _at_level(log_ratio: Tensor, level: str, sequence: Tensor, count: int) -> Tensor:
    """The log-ratio that stands for each token: its own, or its sequence's mean or sum; (n,)."""
    if level == "token":
        return log_ratio
    if level == "sequence":
        return mean_by_sequence(log_ratio, sequence, count)[sequence]
    if level == "sequence_sum":
        return sum_by_sequence(log_ratio, sequence, count)[sequence]
    raise HanlinError(f"level is {level!r}; it must be token, sequence or sequence_sum.")


@torch.no_grad()
def _watch(
    log_ratio: Tensor, ratio: Tensor, advantages: Tensor, clip: tuple[float, float], form: Form, dual: float | None
) -> Metrics:
    n = float(len(ratio))
    if not n:
        return {}
    found = {
        "clip_low": ((ratio < 1 - clip[0]) & (advantages < 0)).sum(),
        "clip_high": ((ratio > 1 + clip[1]) & (advantages > 0)).sum(),
        "ratio": ratio.sum(),
        "ratio_far": ((ratio < 0.5) | (ratio > 2)).sum(),
        "approx_kl": _k3(log_ratio).sum(),
        "ratio_peak": ratio.max(),
    }
    if form in ("none", "dppo"):  # the one has no clip, the other's is on probabilities
        del found["clip_low"], found["clip_high"]
    if dual is not None and form == "clip":
        found["dual_clip"] = ((ratio > dual) & (advantages < 0)).sum()
    sums = torch.stack([value.double() for value in found.values()]).tolist()  # one transfer for all
    return {name: (value, 1.0 if name == "ratio_peak" else n) for name, value in zip(found, sums, strict=True)}


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    sequence: Tensor,
    count: int,
    *,
    clip: float | None = None,
    aggregate: Aggregate = "token",
    length: float | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's critic: the sum of 1/2 max((V - R)^2, (V_c - R)^2), V_c = V_old + clip(V - V_old, -clip, clip).

    values, old_values, returns (n,); gradient to `values` alone. clip None: 1/2 (V - R)^2, and old_values may be None.
    Metrics: value_loss, value_clip (share where the clipped term counts), and the first and second moments of the
    returns and of what the values miss, from which `explained_variance` is read after any number of parts.
    """
    values, returns = wide(values), wide(returns).detach()
    plain = (values - returns).square()
    cost, clipped = plain, torch.zeros_like(plain, dtype=torch.bool)
    if clip is not None:
        if old_values is None:
            raise HanlinError("The value clip measures from the old values; give them, or clip=None.")
        before = old_values.detach().to(values.dtype)
        bounded = (before + (values - before).clamp(-clip, clip) - returns).square()
        cost, clipped = torch.maximum(plain, bounded), bounded > plain
    cost = cost / 2
    total = add_up(cost, sequence, count, aggregate, length)
    n = float(len(values))
    if not n:
        return total, {}
    with torch.no_grad():
        truth, missed = returns.double(), (returns - values).double()
        found = {
            "value_loss": cost.sum(), "value_clip": clipped.sum(), "return": truth.sum(),
            "return_square": truth.square().sum(), "value_error": missed.sum(),
            "value_error_square": missed.square().sum(),
        }  # fmt: skip
        sums = torch.stack([value.double() for value in found.values()]).tolist()
    return total, {name: (value, n) for name, value in zip(found, sums, strict=True)}


def explained_variance(metrics: Metrics) -> float:
    """1 - Var(R - V) / Var(R) from the added-up metrics of `value_loss`; 0 where the returns do not vary."""

    def variance(name: str) -> float:
        (total, n), (squares, _) = metrics[name], metrics[f"{name}_square"]
        return squares / n - (total / n) ** 2

    spread = variance("return")
    return 1 - variance("value_error") / spread if spread > 0 else 0.0


def rollout_weights(
    logp_old: Tensor,
    logp_rollout: Tensor,
    sequence: Tensor,
    count: int,
    *,
    mode: Literal["tis", "mask"] = "tis",
    cap: float = 2.0,
    low: float = 0.0,
    level: Literal["token", "sequence", "geometric"] = "token",
) -> tuple[Tensor, Metrics]:
    """What each token counts when the engine that drew it gave it another probability than the trainer does.

    w = exp(log p_old - log p_rollout), all (n,): of the token, of the whole sequence (the product), or the geometric
    mean over the sequence. "tis" (truncated importance sampling): clip(w, low, cap). "mask" (IcePop): 0 outside
    [low, cap]; what stays has weight w, for "geometric" the token's own (there the mean is only a test). No gradient.

    Metrics over tokens: rollout/weight (mean), rollout/cut (share clipped or dropped), rollout/kl (k3 of the engine
    against the trainer).
    """
    if not 0 <= low < cap:
        raise HanlinError(f"low is {low} and cap {cap}; 0 <= low < cap.")
    apart = (wide(logp_old) - wide(logp_rollout)).detach()
    if level not in MISMATCH:
        raise HanlinError(f"level is {level!r}; it must be one of {', '.join(MISMATCH)}.")
    test = _at_level(apart, MISMATCH[level], sequence, count).clamp(-FARTHEST, FARTHEST).exp()
    cut = (test < low) | (test > cap)
    if mode == "tis":
        weight = test.clamp(low, cap)
    elif mode == "mask":
        own = apart.clamp(-FARTHEST, FARTHEST).exp() if level == "geometric" else test
        weight = own.masked_fill(cut, 0.0)
    else:
        raise HanlinError(f"mode is {mode!r}; it must be tis or mask.")
    n = float(len(weight))
    if not n:
        return weight, {}
    sums = torch.stack([weight.sum(), cut.sum(), _k3(apart).sum()]).tolist()
    return weight, dict(zip(("rollout/weight", "rollout/cut", "rollout/kl"), ((s, n) for s in sums), strict=True))


MISMATCH = {"token": "token", "sequence": "sequence_sum", "geometric": "sequence"}  # levels of `rollout_weights`
