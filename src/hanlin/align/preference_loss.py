"""Losses of preference learning: what is made of a few numbers a pair, an answer or a group. No model inside.

    delta = (log p_w - log p_ref_w) - (log p_l - log p_ref_l)      w: chosen, l: rejected; sums over the answer's tokens
    DPO     -log sigmoid(beta delta)                                                           arXiv:2305.18290

The other pairwise methods are other links between the same numbers (`LINKS`). KTO judges answers one by one, RRHF ranks
groups of them, RAHF fits hidden states. What comes back is a sum over pairs (answers, groups, tokens) and metrics as
(sum, count). Losses whose papers add the likelihood of the chosen answer (ORPO, RRHF) return their own term alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.wide import wide

Metrics = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Pairs:
    """What a link sees, each (pairs,): log-probabilities, how far they are from the reference's, and the options."""

    chosen: Tensor
    rejected: Tensor
    chosen_change: Tensor
    rejected_change: Tensor
    divergence_chosen: Tensor | None
    divergence_rejected: Tensor | None
    margin: Tensor | float | None
    beta: float
    smoothing: float
    gamma: float
    alpha: float | None
    penalty: float

    @property
    def delta(self) -> Tensor:
        return self.chosen_change - self.rejected_change

    def past_margin(self, lead: Tensor) -> Tensor:
        return lead if self.margin is None else lead - self.margin


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    kind: str = "dpo",
    beta: float = 0.1,
    smoothing: float = 0.0,
    margin: Tensor | float | None = None,
    gamma: float = 0.0,
    alpha: float | None = None,
    penalty: float = 0.0,
    divergence_chosen: Tensor | None = None,
    divergence_rejected: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The sum over pairs of a kind of `LINKS`, with gradient to `chosen`, `rejected` and TDPO's divergences.

    chosen, rejected, ref_chosen, ref_rejected (pairs,): log-probabilities of the answers, summed over their tokens; for
    simpo and orpo, and for ipo where beta shall not depend on the length (as TRL, not as OpenRLHF), means over their
    tokens. No reference is a reference of 0. divergence_chosen, divergence_rejected (pairs,): TDPO's sum over the
    answer's tokens of KL(reference || policy).

    smoothing: the share of labels that are wrong, in cdpo (dpo and simpo take it likewise) and robust (below 1/2).
    margin: by how much the chosen reward must lead (a number or (pairs,)), in the kinds made of log sigmoid and hinge;
    gamma: SimPO's. alpha: TDPO's weight of the divergences (tdpo1: 1, tdpo2: 0.5). penalty: DPOP's lambda.

    Metrics over pairs: rewards/accuracy (the chosen one's is higher), rewards/margin, rewards/chosen, rewards/rejected;
    a reward is beta (log p - log p_ref).
    """
    if kind not in LINKS:
        raise HanlinError(f"There is no preference loss {kind!r}; there are {', '.join(LINKS)}.")
    if not 0 <= smoothing < (0.5):
        raise HanlinError(f"smoothing is {smoothing}; a share of wrong labels is at least 0 and below 1/2.")
    chosen, rejected = wide(chosen), wide(rejected)
    pairs = Pairs(
        chosen, rejected, chosen - _reference(ref_chosen, chosen), rejected - _reference(ref_rejected, rejected),
        divergence_chosen, divergence_rejected, margin, beta, smoothing, gamma, alpha, penalty,
    )  # fmt: skip
    return LINKS[kind](pairs).sum(), _watch(pairs)


def _reference(given: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if given is None else given.detach().to(like.dtype)


@torch.no_grad()
def _watch(pairs: Pairs) -> Metrics:
    n = float(len(pairs.chosen))
    chosen, rejected = pairs.beta * pairs.chosen_change, pairs.beta * pairs.rejected_change
    found = {
        "rewards/accuracy": (chosen > rejected).to(chosen.dtype),
        "rewards/margin": chosen - rejected,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
    }
    sums = torch.stack(list(found.values())).sum(1).tolist()
    return {name: (value, n) for name, value in zip(found, sums, strict=True)} if n else {}


def _logistic(lead: Tensor, smoothing: float = 0.0) -> Tensor:
    """-(1 - s) log sigmoid(x) - s log sigmoid(-x): a label that is wrong with probability s."""
    right = -F.logsigmoid(lead)
    return right if smoothing == 0 else (1 - smoothing) * right - smoothing * F.logsigmoid(-lead)


def _dpo(p: Pairs) -> Tensor:
    return _logistic(p.past_margin(p.beta * p.delta), p.smoothing)


def _robust(p: Pairs) -> Tensor:
    """Unbiased for the clean labels' loss (arXiv:2403.00409)."""
    lead, s = p.past_margin(p.beta * p.delta), p.smoothing
    return ((s - 1) * F.logsigmoid(lead) + s * F.logsigmoid(-lead)) / (1 - 2 * s)


def _hinge(p: Pairs) -> Tensor:
    """SLiC (arXiv:2305.10425), and RSO's loss on its own samples (arXiv:2309.06657)."""
    return (1 - p.past_margin(p.beta * p.delta)).relu()


def _ipo(p: Pairs) -> Tensor:
    """A lead of exactly 1 / (2 beta) is wanted, no more (arXiv:2310.12036 eq. 17)."""
    return (p.delta - 1 / (2 * p.beta)).square()


def _dpop(p: Pairs) -> Tensor:
    """The chosen answer must not become less likely than under the reference (arXiv:2402.13228 eq. 3)."""
    lost = (-p.chosen_change).relu()
    return _logistic(p.past_margin(p.beta * (p.delta - p.penalty * lost)))


def _tdpo1(p: Pairs) -> Tensor:
    """Token-level DPO (arXiv:2404.11999 eq. 17): rejected answers may drift further than chosen ones, at a price."""
    further, nearer = _divergences(p)
    alpha = 1.0 if p.alpha is None else p.alpha
    return _logistic(p.past_margin(p.beta * (p.delta - alpha * (further - nearer))))


def _tdpo2(p: Pairs) -> Tensor:
    """The same with the chosen answer's divergence as a mere baseline (eq. 19)."""
    further, nearer = _divergences(p)
    alpha = 0.5 if p.alpha is None else p.alpha
    return _logistic(p.past_margin(p.beta * (p.delta - alpha * (further - nearer.detach()))))


def _divergences(p: Pairs) -> tuple[Tensor, Tensor]:
    if p.divergence_chosen is None or p.divergence_rejected is None:
        raise HanlinError("TDPO needs divergence_chosen and divergence_rejected: the answers' KL(reference || policy).")
    return p.divergence_rejected.to(p.chosen.dtype), p.divergence_chosen.to(p.chosen.dtype)


def _simpo(p: Pairs) -> Tensor:
    """No reference; per-token log-probabilities and a margin (arXiv:2405.14734 eq. 6)."""
    return _logistic(p.past_margin(p.beta * (p.chosen - p.rejected) - p.gamma), p.smoothing)


def _orpo(p: Pairs) -> Tensor:
    """-beta log sigmoid of the log odds ratio, odds = p / (1 - p) of the per-token probability (arXiv:2403.07691)."""
    lead = (p.chosen - p.rejected) - (_log_one_less(p.chosen) - _log_one_less(p.rejected))
    return p.beta * _logistic(p.past_margin(lead))


def _log_one_less(logp: Tensor) -> Tensor:
    """log(1 - exp(logp)) without losing digits at either end; a certain answer's is held finite."""
    x = logp.clamp_max(-torch.finfo(logp.dtype).eps)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


LINKS: dict[str, Callable[[Pairs], Tensor]] = {
    "dpo": _dpo,
    "cdpo": _dpo,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "dpop": _dpop,
    "tdpo1": _tdpo1,
    "tdpo2": _tdpo2,
    "simpo": _simpo,
    "orpo": _orpo,
}


def kto_loss(
    change: Tensor,
    good: Tensor,
    anchor: Tensor | float,
    *,
    beta: float = 0.1,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """KTO (arXiv:2402.01306 eq. 7): the sum over answers of w (1 - sigmoid(beta (d - z))), for bad ones of z - d.

    change (n,): d = log p - log p_ref, summed over the answer; good (n,) bool; anchor: z, a number, () or (n,): the
    mean of d over prompts with answers of others, held at 0 from below and without gradient. Metrics: rewards/accuracy
    (good above z, bad below), rewards/chosen and rewards/rejected, each over its own kind.
    """
    change = wide(change)
    anchor = torch.as_tensor(anchor, dtype=change.dtype, device=change.device).detach().clamp_min(0)
    side = torch.where(good, 1.0, -1.0).to(change.dtype)
    lead = side * (change - anchor)
    weight = torch.where(good, good_weight, bad_weight).to(change.dtype)
    total = (weight * torch.sigmoid(-beta * lead)).sum()
    with torch.no_grad():
        metrics = {"rewards/accuracy": (float((lead > 0).sum()), float(len(change)))} if len(change) else {}
        for name, which in (("rewards/chosen", good), ("rewards/rejected", ~good)):
            if n := int(which.sum()):
                metrics[name] = (float(beta * change[which].sum()), float(n))
    return total, metrics


def kto_anchor(changes: Tensor) -> Tensor:
    """Sum and count (2,), fp64, of log p - log p_ref (n,) of answers to others' prompts. Added up over micro-batches
    and ranks, sum / count is the z of `kto_loss`."""
    changes = changes.detach().double()
    return torch.stack([changes.sum(), changes.new_tensor(float(len(changes)))])


def rrhf_loss(said: Tensor, scores: Tensor, group: Tensor) -> tuple[Tensor, Metrics]:
    """RRHF's ranking (arXiv:2304.05302 eq. 3): the sum over pairs of a group with r_i < r_j of max(0, p_i - p_j).

    said (n,): p, log-probabilities of the answers over a power of their length; scores (n,): r; group (n,) int64.
    Metrics: accuracy, the share of the ranked pairs that the policy ranks alike.
    """
    said = wide(said)
    worse, better = ((group[:, None] == group) & (scores[:, None] < scores)).nonzero(as_tuple=True)
    lead = said[better] - said[worse]
    pairs = float(len(lead))
    return (-lead).relu().sum(), {"accuracy": (float((lead > 0).sum()), pairs)} if pairs else {}


def rahf_target(base: Tensor, good: Tensor, bad: Tensor, alpha: float) -> Tensor:
    """RAHF (arXiv:2312.15997): where hidden states shall go, h_base + alpha (h_good - h_bad), without gradient."""
    return (base + alpha * (good - bad)).detach()


def rahf_loss(hidden: Tensor, target: Tensor) -> Tensor:
    """The sum over tokens of the mean over layers of || h - target ||_2; (n, layers, width) or (n, width)."""
    apart = torch.linalg.vector_norm(wide(hidden) - wide(target).detach(), dim=-1)
    return apart.flatten(1).mean(1).sum() if apart.dim() > 1 else apart.sum()
