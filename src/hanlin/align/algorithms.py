"""On-policy algorithms, a row each: which advantage, which loss, what the reference costs.

    answers -> scores -> advantage(scored)  -> loss: ratio of which `level`, in which `form`, clipped where,
    `aggregate`d how

A new algorithm is a new row; a new idea is a function `Scored -> (answers, tokens)` in the place of one of these.

    reinforce      return to go                                               Williams 1992
    ppo            generalised advantage of a critic, whitened                arXiv:1707.06347, 2203.02155
    rloo           score against the mean of the others                       arXiv:2402.14740
    remax          score against the greedy answer's                          arXiv:2310.10505
    grpo           score against its group, by its deviation                  arXiv:2402.03300
    grpo_process   the same of every step's reward                            arXiv:2402.03300, 4.1.3
    dr_grpo        score against its group; lengths and deviations left out   arXiv:2503.20783
    dapo           clip higher, mean over tokens, groups that say something   arXiv:2503.14476
    gspo           ratio of the whole answer                                  arXiv:2507.18071
    cispo          clipped weight, every token keeps its gradient             arXiv:2506.13585
    reinforce_pp   return to go, whitened over the batch                      arXiv:2501.03262
    reinforce_pp_baseline   score against its group, whitened over the batch
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.rl.advantages import (
    gae,
    group_advantages,
    process_advantages,
    reward_to_go,
)


@dataclass(frozen=True)
class Scored:
    """Scored answers to one round of prompts: N answers, at most T tokens of completion.

    scores (N,): of each, what the reference costs taken off if the algorithm counts that by answer; token_rewards (N,
    T): the score at the last written token, less what the reference costs token by token; mask (N, T): what the model
    wrote; group (N,): answers to one prompt; greedy (N,): score of the greedy answer; values (N, T): of a critic;
    steps: rewards of the steps of each answer and the tokens at which they end."""

    scores: Tensor
    token_rewards: Tensor
    mask: Tensor
    group: Tensor
    gamma: float
    lam: float
    greedy: Tensor | None = None
    values: Tensor | None = None
    steps: tuple[list[list[float]], list[list[int]]] | None = None


def of_answer(advantage: Callable[[Scored], Tensor]) -> Callable[[Scored], Tensor]:
    """One number an answer, for all of its tokens."""

    @wraps(advantage)
    def spread(scored: Scored) -> Tensor:
        return advantage(scored)[:, None] * scored.mask

    return spread


def against_group(scored: Scored) -> Tensor:
    """(score - mean of its group) / standard deviation of its group."""
    return group_advantages(scored.scores, scored.group, scale="std")


def against_mean(scored: Scored) -> Tensor:
    """score - mean of its group."""
    return group_advantages(scored.scores, scored.group, scale="none")


def against_others(scored: Scored) -> Tensor:
    """score - mean of the others of its group."""
    return group_advantages(scored.scores, scored.group, baseline="leave_one_out", scale="none")


def against_greedy(scored: Scored) -> Tensor:
    """score - the score of the greedy answer to the same prompt."""
    assert scored.greedy is not None
    return scored.scores - scored.greedy


def of_steps(scored: Scored) -> Tensor:
    """Normalised rewards of the steps that end at or after each token."""
    if scored.steps is None:
        raise HanlinError(
            "This algorithm wants a reward for each step of an answer: rewards of the kind process, or a function that "
            "returns a list of numbers for each sample."
        )
    return process_advantages(*scored.steps, scored.group, scored.mask.shape[1]) * scored.mask


def to_go(scored: Scored) -> Tensor:
    """Discounted sum of the rewards from each token on."""
    return reward_to_go(scored.token_rewards, scored.mask, gamma=scored.gamma)


def generalised(scored: Scored) -> Tensor:
    """GAE (arXiv:1506.02438)."""
    assert scored.values is not None
    return gae(scored.token_rewards, scored.values, scored.mask, gamma=scored.gamma, lam=scored.lam)[0]


@dataclass(frozen=True)
class Algorithm:
    """advantage: (N, T) of N answers. whiten: mean 0 and deviation 1 over all written tokens of a round.

    The loss: form and level as `policy_loss` has them; clip (below, above); aggregate: mean over tokens, over answers
    of their token mean, or by a constant length. beta, kl_in_reward, kl_in_loss: the weight of the divergence from the
    reference, where it is counted and by which estimator (k1, k2, k3); by_answer: in the reward it is a sum over the
    answer. critic: learns values. greedy: one greedy answer more. refill: groups whose scores are all equal are left
    out and others drawn in their place. epochs: passes over the answers of a round."""

    advantage: Callable[[Scored], Tensor]
    whiten: bool = False
    form: Literal["clip", "none", "cispo", "dppo"] = "clip"
    level: Literal["token", "sequence", "sequence_sum"] = "token"
    clip: tuple[float, float] = (0.2, 0.2)
    dual: float | None = None
    aggregate: Literal["token", "sequence", "constant"] = "token"
    beta: float = 0.0
    kl_in_reward: Literal["k1", "k2", "k3"] | None = None
    kl_in_loss: Literal["k1", "k2", "k3", "k3+"] | None = None
    by_answer: bool = False
    critic: bool = False
    greedy: bool = False
    refill: bool = False
    overlong: bool = False
    epochs: int = 1
    groups: bool = True  # whether several answers to a prompt are needed

    @property
    def discounts(self) -> bool:
        """Whether a reward is worth less the later it comes (gamma)."""
        return self.advantage in (to_go, generalised)

    def described(self) -> dict[str, Any]:
        """JSON that tells this row from another: a run goes on with the same one only."""
        rest = {name: value for name, value in vars(self).items() if name != "advantage"}
        return {"advantage": getattr(self.advantage, "__qualname__", repr(self.advantage)), **rest}


def discounted_returns(scored: Scored) -> Tensor:
    """What a critic learns: GAE's returns."""
    assert scored.values is not None
    return gae(scored.token_rewards, scored.values, scored.mask, gamma=scored.gamma, lam=scored.lam)[1]


ALGORITHMS: dict[str, Algorithm] = {
    "reinforce": Algorithm(to_go, form="none", kl_in_reward="k1", groups=False),
    "ppo": Algorithm(generalised, whiten=True, critic=True, beta=0.05, kl_in_reward="k1", groups=False),
    "rloo": Algorithm(
        of_answer(against_others), level="sequence_sum", aggregate="sequence", beta=0.05, kl_in_reward="k1",
        by_answer=True,
    ),
    "remax": Algorithm(
        of_answer(against_greedy), form="none", beta=0.05, kl_in_reward="k1", by_answer=True, greedy=True, groups=False
    ),
    "grpo": Algorithm(of_answer(against_group), aggregate="sequence", beta=0.04, kl_in_loss="k3"),
    "grpo_process": Algorithm(of_steps, aggregate="sequence", beta=0.04, kl_in_loss="k3"),
    "dr_grpo": Algorithm(of_answer(against_mean), aggregate="constant"),
    "dapo": Algorithm(of_answer(against_group), clip=(0.2, 0.28), refill=True, overlong=True),
    "gspo": Algorithm(of_answer(against_group), level="sequence", clip=(3e-4, 4e-4), aggregate="sequence"),
    "cispo": Algorithm(of_answer(against_group), form="cispo", clip=(1.0, 0.28)),
    "reinforce_pp": Algorithm(to_go, whiten=True, beta=0.01, kl_in_reward="k1", groups=False),
    "reinforce_pp_baseline": Algorithm(of_answer(against_mean), whiten=True, beta=0.01, kl_in_loss="k2"),
}  # fmt: skip
