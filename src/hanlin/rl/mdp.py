"""A finite Markov decision process as tensors, and the exact value of a policy.

    V_pi = R_pi + gamma P_pi V_pi   =>   V_pi = (I - gamma P_pi)^-1 R_pi        (Bellman 1957; Puterman 1994, 6.1)

P[s, a, s'] is the probability to *go on* in s'. A row may sum to less than 1: what is missing ends the episode, and an
ended episode earns nothing more. So a terminal state needs no self-loop and no special case.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError

Table = Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]]


@dataclass(frozen=True)
class MDP:
    """P (states, actions, states), R (states, actions) expected reward, start (states,) distribution; all float64.

    gamma: the discount, 0 to 1; at 1 a value exists only where the episode ends with probability 1.
    """

    P: Tensor
    R: Tensor
    gamma: float
    start: Tensor

    def __post_init__(self) -> None:
        states, actions = self.R.shape
        if self.P.shape != (states, actions, states) or self.start.shape != (states,):
            raise HanlinError(
                f"An MDP of {states} states and {actions} actions needs P ({states}, {actions}, {states}) and start "
                f"({states},); found {tuple(self.P.shape)} and {tuple(self.start.shape)}."
            )
        if not 0 <= self.gamma <= 1:
            raise HanlinError(f"The discount gamma is {self.gamma}; it must lie between 0 and 1.")
        mass = self.P.sum(-1)
        if self.P.min() < 0 or mass.max() > 1 + 1e-9 or abs(float(self.start.sum()) - 1) > 1e-9:
            raise HanlinError("Probabilities must be 0 or more, a row of P sum to at most 1, and start sum to 1.")

    @property
    def states(self) -> int:
        return self.R.shape[0]

    @property
    def actions(self) -> int:
        return self.R.shape[1]

    def q(self, V: Tensor) -> Tensor:
        """Q(s, a) = R(s, a) + gamma sum_s' P(s'|s, a) V(s'). V (states,) -> (states, actions)."""
        return self.R + self.gamma * self.P @ V

    def value(self, policy: Tensor) -> Tensor:
        """V of a policy (states, actions; rows sum to 1) by one linear solve -> (states,).

        A policy that may never end has no value at gamma = 1: a `HanlinError`.
        """
        P = torch.einsum("sa,sat->st", policy, self.P)
        R = (policy * self.R).sum(-1)  # (states,)
        try:
            V = torch.linalg.solve(torch.eye(self.states, dtype=P.dtype) - self.gamma * P, R)
        except torch.linalg.LinAlgError as error:
            raise HanlinError("This policy may never end, so it has no value at gamma = 1; use gamma < 1.") from error
        return V

    def expected(self, V: Tensor) -> float:
        """V averaged over the states that an episode starts in."""
        return float(self.start @ V)


def deterministic(actions: Tensor, count: int) -> Tensor:
    """The policy that takes actions[s] (states,) in state s, as (states, count)."""
    return torch.nn.functional.one_hot(actions, count).double()


def soften(policy: Tensor, epsilon: float) -> Tensor:
    """The policy that takes a uniform action with probability epsilon, else follows `policy` (states, actions)."""
    return (1 - epsilon) * policy + epsilon / policy.shape[1]


def from_table(table: Table, start: Sequence[float], *, gamma: float) -> MDP:
    """An MDP of a transition table: table[s][a] = [(probability, next state, reward, terminated), ...].

    A state that is entered only by transitions which end the episode is terminal: whatever the table says of leaving it
    (CliffWalking's goal can be walked out of) is dropped, so its value is 0.
    """
    states, actions = len(table), len(table[0])
    P = torch.zeros(states, actions, states, dtype=torch.float64)
    R = torch.zeros(states, actions, dtype=torch.float64)
    ending, going = set[int](), set[int]()
    for s, row in table.items():
        for a, outcomes in row.items():
            for probability, following, reward, terminated in outcomes:
                R[s, a] += probability * float(reward)
                if terminated:
                    ending.add(int(following))
                else:
                    P[s, a, following] += probability
                    going.add(int(following))
    terminal = sorted(ending - going)
    P[terminal], R[terminal] = 0.0, 0.0
    return MDP(P, R, gamma, torch.as_tensor(start, dtype=torch.float64))


def read_mdp(env: Any, *, gamma: float) -> MDP:
    """The MDP that a gymnasium toy-text environment publishes (`env.unwrapped.P`); others are a `HanlinError`.

    A time limit is not a part of it: a state does not know how many steps are left.
    """
    inner = env.unwrapped
    table, start = getattr(inner, "P", None), getattr(inner, "initial_state_distrib", None)
    if not isinstance(table, Mapping) or start is None:
        name = getattr(getattr(env, "spec", None), "id", type(inner).__name__)
        raise HanlinError(
            f"{name} publishes no transition table, so its MDP is not known: planning and TD(0) here need one. "
            "FrozenLake-v1, CliffWalking-v1 and Taxi-v4 have it; for others learn from samples (dqn, ppo)."
        )
    return from_table(table, start, gamma=gamma)


class Count(NamedTuple):
    """The space of the integers 0 .. n - 1, as `gymnasium.spaces.Discrete` has it."""

    n: int


class SampledMDP:
    """An MDP as an environment to act in, with gymnasium's `reset` and `step`.

    max_steps: truncate an episode after so many steps (None: never). The reward is R(s, a).
    """

    def __init__(self, mdp: MDP, *, max_steps: int | None = None) -> None:
        self.mdp, self.max_steps = mdp, max_steps
        self.observation_space, self.action_space = Count(mdp.states), Count(mdp.actions)
        # One more column, "the episode ended", makes every row a distribution; cumulated for the draw.
        ends = (1 - mdp.P.sum(-1, keepdim=True)).clamp(min=0)
        self._cumulated = torch.cat([mdp.P, ends], -1).cumsum(-1).numpy()
        self._rewards = mdp.R.numpy()
        self._start = mdp.start.cumsum(0).numpy()
        self._generator = torch.Generator()
        self._uniforms = iter(())
        self._state, self._steps = 0, 0

    @property
    def unwrapped(self) -> "SampledMDP":
        return self

    def reset(self, *, seed: int | None = None) -> tuple[int, dict[str, Any]]:
        """Draw a starting state; a seed starts the randomness anew."""
        if seed is not None:
            self._generator.manual_seed(seed)
            self._uniforms = iter(())
        self._state = min(int(self._start.searchsorted(self._uniform(), side="right")), self.mdp.states - 1)
        self._steps = 0
        return self._state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """(next state, reward, terminated, truncated, {}); a terminated episode stays in its last state."""
        row = self._cumulated[self._state, action]
        drawn = int(row.searchsorted(self._uniform() * row[-1], side="right"))
        reward = float(self._rewards[self._state, action])
        terminated = drawn >= self.mdp.states
        self._state = self._state if terminated else drawn
        self._steps += 1
        return self._state, reward, terminated, self._steps == self.max_steps and not terminated, {}

    def _uniform(self) -> float:
        found = next(self._uniforms, None)
        if found is None:  # a thousand at a time: a call to torch costs more than a step
            self._uniforms = iter(torch.rand(1000, generator=self._generator, dtype=torch.float64).tolist())
            found = next(self._uniforms)
        return found
