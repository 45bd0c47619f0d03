"""Learning from samples with one entry a state: Monte Carlo, TD(0), SARSA, Q-learning (Sutton and Barto, ch. 5 and 6).

Each moves an estimate towards a target, V(s) += alpha [target - V(s)]; they differ in the target alone:

    Monte Carlo   G = r_1 + gamma r_2 + ...       what really followed: no bias, much variance
    TD(0)         r + gamma V(s')                  one step, then the estimate
    SARSA         r + gamma Q(s', a')              a' as the policy takes it: learns the policy that explores
    Q-learning    r + gamma max_a Q(s', a)         learns the greedy policy, whatever explores

A terminated episode has nothing behind it; a truncated one goes on in the estimate (`episodes`). Every function changes
the table that it is given and yields each finished episode, so that its caller can log, stop or look at any time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hanlin.core.seeds import derive
from hanlin.rl.episodes import Act, Environment, Episode, EpsilonGreedy, Linear, Step, Tally, walk


class StepSize(NamedTuple):
    """alpha = scale / n^power at the n-th update of an entry: power 0 a constant, power 1 with scale 1 the average."""

    scale: float
    power: float

    def at(self, n: float) -> float:
        return self.scale / n**self.power


AVERAGE = StepSize(1.0, 1.0)
SLOWING = StepSize(1.0, 0.7)
TENTH = StepSize(0.1, 0.0)


class _Entries:
    """A table (its NumPy view: an element costs a tenth of a tensor's) that counts the updates of each entry."""

    def __init__(self, table: Tensor, step_size: StepSize) -> None:
        self.values = table.numpy()
        self.updates = np.zeros_like(self.values)
        self.step_size = step_size

    def move(self, at: tuple[int, ...], target: float) -> None:
        self.updates[at] += 1
        self.values[at] += self.step_size.at(self.updates[at]) * (target - self.values[at])


def predict_monte_carlo(
    env: Environment, V: Tensor, policy: Tensor, *, gamma: float, steps: int, seed: int,
    first_visit: bool = True, step_size: StepSize = AVERAGE,
) -> Iterator[Episode]:  # fmt: skip
    """V of `policy` (states, actions) from whole returns. first_visit: only the first of a state's visits counts.

    V (states,) float64. A truncated episode's return is completed by V(s').
    """
    entries, tally, path = _Entries(V, step_size), Tally(), list[Step]()
    for step in walk(env, _follow(policy, seed), steps=steps, seed=seed):
        path.append(step)
        if episode := tally.add(step):
            tail = 0.0 if step.terminated else float(entries.values[step.next_state])
            for at, target in _targets([(s.state,) for s in path], path, tail, gamma, first_visit):
                entries.move(at, target)
            path.clear()
            yield episode


def predict_td0(
    env: Environment, V: Tensor, policy: Tensor, *, gamma: float, steps: int, seed: int,
    step_size: StepSize = SLOWING,
) -> Iterator[Episode]:  # fmt: skip
    """V of `policy` (states, actions) from single steps. V (states,) float64."""
    entries, tally = _Entries(V, step_size), Tally()
    for step in walk(env, _follow(policy, seed), steps=steps, seed=seed):
        future = 0.0 if step.terminated else entries.values[step.next_state]
        entries.move((step.state,), step.reward + gamma * future)
        if episode := tally.add(step):
            yield episode


def monte_carlo(
    env: Environment, Q: Tensor, *, gamma: float, steps: int, seed: int, epsilon: Linear,
    first_visit: bool = True, step_size: StepSize = TENTH,
) -> Iterator[Episode]:  # fmt: skip
    """Control: an epsilon-greedy policy on the Q (states, actions) that its own returns teach."""
    entries, tally, path = _Entries(Q, step_size), Tally(), list[Step]()
    act = _explore(entries, epsilon, seed)
    for step in walk(env, act, steps=steps, seed=seed):
        path.append(step)
        if episode := tally.add(step):
            tail = 0.0 if step.terminated else float(entries.values[step.next_state, act(step.next_state)])
            for at, target in _targets([(s.state, s.action) for s in path], path, tail, gamma, first_visit):
                entries.move(at, target)
            path.clear()
            yield episode


def sarsa(
    env: Environment, Q: Tensor, *, gamma: float, steps: int, seed: int, epsilon: Linear,
    step_size: StepSize = TENTH,
) -> Iterator[Episode]:  # fmt: skip
    """Control on-policy: Q(s, a) towards r + gamma Q(s', a'), once a' is chosen: at the next step of the walk."""
    entries, tally = _Entries(Q, step_size), Tally()
    act = _explore(entries, epsilon, seed)
    before: Step | None = None
    for step in walk(env, act, steps=steps, seed=seed):
        if before is not None:
            entries.move((before.state, before.action), before.reward + gamma * entries.values[step.state, step.action])
        before = None if step.last else step
        if step.last:
            future = 0.0 if step.terminated else entries.values[step.next_state, act(step.next_state)]
            entries.move((step.state, step.action), step.reward + gamma * future)
        if episode := tally.add(step):
            yield episode


def q_learning(
    env: Environment, Q: Tensor, *, gamma: float, steps: int, seed: int, epsilon: Linear,
    step_size: StepSize = TENTH,
) -> Iterator[Episode]:  # fmt: skip
    """Control off-policy: Q(s, a) towards r + gamma max_a' Q(s', a') (Watkins 1989)."""
    entries, tally = _Entries(Q, step_size), Tally()
    for step in walk(env, _explore(entries, epsilon, seed), steps=steps, seed=seed):
        future = 0.0 if step.terminated else entries.values[step.next_state].max()
        entries.move((step.state, step.action), step.reward + gamma * future)
        if episode := tally.add(step):
            yield episode


def _targets(
    keys: list[tuple[int, ...]], path: list[Step], tail: float, gamma: float, first_visit: bool
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Each counted visit with the return that followed it; computed from the end, given in the order of time."""
    returns = [tail]
    for step in reversed(path):
        returns.append(step.reward + gamma * returns[-1])
    seen = set[tuple[int, ...]]()
    for key, target in zip(keys, reversed(returns), strict=False):  # the tail itself, last, belongs to no visit
        if not (first_visit and key in seen):
            yield key, target
        seen.add(key)


def _explore(entries: _Entries, epsilon: Linear, seed: int) -> EpsilonGreedy:
    return EpsilonGreedy(entries.values.__getitem__, epsilon, np.random.default_rng(derive(seed, "actions")))


def _follow(policy: Tensor, seed: int) -> Act:
    """Draws actions of a policy (states, actions)."""
    cumulated = policy.cumsum(-1).numpy()
    rng = np.random.default_rng(derive(seed, "actions"))
    last = policy.shape[1] - 1
    return lambda state: min(int(cumulated[state].searchsorted(rng.random(), side="right")), last)


def greedy(Q: Tensor) -> Tensor:
    """The first best action of every state: (states, actions) -> (states,)."""
    return torch.argmax(Q, -1)
