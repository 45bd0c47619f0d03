"""Planning where the MDP is known: Bellman's operators, value iteration, policy iteration.

    (T_pi V)(s) = sum_a pi(a|s) [R(s, a) + gamma sum_s' P(s'|s, a) V(s')]        V_pi is its fixed point
    (T* V)(s)   = max_a        [R(s, a) + gamma sum_s' P(s'|s, a) V(s')]         V*   is its fixed point

Both shrink the distance of any two value functions by gamma in the maximum norm, so repeating T* finds V* from anywhere
(value iteration; Bellman 1957) and ||V - V*|| <= gamma / (1 - gamma) ||V - V_before|| says when to stop. Policy
iteration (Howard 1960) solves for V_pi exactly, acts greedily on it, and ends after few rounds: no policy comes twice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.rl.mdp import MDP, deterministic

BETTER = 1e-10  # a Q value must be larger by so much: equal ones differ by rounding, and would be exchanged for ever


@dataclass(frozen=True)
class Plan:
    """V (states,), the greedy actions (states,), and the largest change of V in each sweep or round."""

    V: Tensor
    actions: Tensor
    changes: tuple[float, ...]


def expectation_backup(mdp: MDP, policy: Tensor, V: Tensor) -> Tensor:
    """T_pi V. policy (states, actions), V (states,) -> (states,)."""
    return (policy * mdp.q(V)).sum(-1)


def optimality_backup(mdp: MDP, V: Tensor) -> Tensor:
    """T* V. V (states,) -> (states,)."""
    return mdp.q(V).amax(-1)


def greedy_actions(mdp: MDP, V: Tensor) -> Tensor:
    """The first best action of every state (states,), of those that are equal to rounding."""
    q = mdp.q(V)
    return (q >= q.amax(-1, keepdim=True) - BETTER).int().argmax(-1)


def value_iteration(mdp: MDP, *, tolerance: float = 1e-10, max_sweeps: int = 100_000) -> Plan:
    """Sweep V <- T* V until V is within `tolerance` of V* (at gamma = 1: until a sweep changes less than that).

    No end after max_sweeps is a `HanlinError`: at gamma = 1 rewards can be collected for ever.
    """
    enough = tolerance * (1 - mdp.gamma) / mdp.gamma if 0 < mdp.gamma < 1 else tolerance
    V = torch.zeros(mdp.states, dtype=mdp.R.dtype)
    changes: list[float] = []
    while not changes or changes[-1] > max(enough, 1e-15 * float(V.abs().max())):
        if len(changes) == max_sweeps:
            raise HanlinError(
                f"Value iteration still changes V by {changes[-1]:.3g} after {max_sweeps} sweeps at gamma "
                f"{mdp.gamma}. A smaller gamma or a larger tolerance ends sooner."
            )
        improved = optimality_backup(mdp, V)
        changes.append(float((improved - V).abs().max()))
        V = improved
    return Plan(V, greedy_actions(mdp, V), tuple(changes))


def policy_iteration(mdp: MDP) -> Plan:
    """Evaluate, act greedily, until no action is better. Needs gamma < 1, or an end that every policy reaches."""
    actions = greedy_actions(mdp, torch.zeros(mdp.states, dtype=mdp.R.dtype))
    states = torch.arange(mdp.states)
    V = mdp.value(deterministic(actions, mdp.actions))
    changes: list[float] = []
    while True:
        q = mdp.q(V)
        best = q.argmax(-1)
        better = q[states, best] > q[states, actions] + BETTER * (1 + V.abs())
        if not better.any():
            return Plan(V, greedy_actions(mdp, V), tuple(changes))
        actions = torch.where(better, best, actions)
        improved = mdp.value(deterministic(actions, mdp.actions))
        changes.append(float((improved - V).abs().max()))
        V = improved
