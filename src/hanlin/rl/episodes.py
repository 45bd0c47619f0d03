"""Acting in an environment: transitions, episodes, exploration, evaluation.

An episode stops for one of two reasons, and gymnasium tells them apart. *Terminated*: the process is over, nothing
more is earned, the target is r. *Truncated*: someone stopped watching (a time limit), the process would have gone on,
and the target is r + gamma V(s'), as within an episode. To treat the second as the first teaches that the
clock, which the state does not show, is death (Pardo et al., arXiv:1712.00378). So every learner here asks
`terminated`, never `done`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from hanlin.core.errors import HanlinError, require

Act = Callable[[Any], int]  # a policy as it is followed: an observation to an action


class Environment(Protocol):
    """What is used of `gymnasium.Env`."""

    observation_space: Any
    action_space: Any

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]: ...

    def step(self, action: Any, /) -> tuple[Any, Any, bool, bool, dict[str, Any]]: ...


class Step(NamedTuple):
    """One transition. `terminated`: s' is worth nothing; `truncated`: the watch ended, s' is worth V(s')."""

    state: Any
    action: int
    reward: float
    next_state: Any
    terminated: bool
    truncated: bool

    @property
    def last(self) -> bool:
        return self.terminated or self.truncated


@dataclass(frozen=True)
class Episode:
    """A finished episode. step: steps of the whole run so far; score: the undiscounted sum of its rewards."""

    step: int
    score: float
    length: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Tally:
    """Counts steps and rewards; `add` answers with the episode that a step completed."""

    def __init__(self) -> None:
        self.step, self._score, self._length = 0, 0.0, 0

    def add(self, step: Step, metrics: Mapping[str, float] | None = None) -> Episode | None:
        self.step += 1
        self._score += step.reward
        self._length += 1
        if not step.last:
            return None
        episode = Episode(self.step, self._score, self._length, metrics or {})
        self._score, self._length = 0.0, 0
        return episode


class Linear(NamedTuple):
    """A line from `first` to `last` over `steps` steps, flat after them."""

    first: float
    last: float
    steps: int

    def at(self, step: int) -> float:
        return self.first + (self.last - self.first) * min(1.0, step / max(1, self.steps))


class EpsilonGreedy:
    """argmax of values(state), ties at random; with probability epsilon (falling step by step) a uniform action.

    values: a state to its action values (actions,). rng: the source of chance.
    """

    def __init__(self, values: Callable[[Any], np.ndarray], epsilon: Linear, rng: np.random.Generator) -> None:
        self.values, self.epsilon, self.rng = values, epsilon, rng
        self.step = 0

    def __call__(self, state: Any) -> int:
        values = self.values(state)
        explore = self.rng.random() < self.epsilon.at(self.step)
        self.step += 1
        if explore:
            return int(self.rng.integers(len(values)))
        best = np.flatnonzero(values == values.max())
        return int(best[0] if len(best) == 1 else self.rng.choice(best))


def walk(env: Environment, act: Act, *, steps: int, seed: int) -> Iterator[Step]:
    """`steps` transitions, episode after episode. `act` sees what a learner changed since the step before."""
    state, _ = env.reset(seed=seed)
    for _ in range(steps):
        action = act(state)
        following, reward, terminated, truncated, _ = env.step(action)
        step = Step(state, action, float(reward), following, bool(terminated), bool(truncated))
        yield step
        state = env.reset()[0] if step.last else following


def evaluate(env: Environment, act: Act, *, episodes: int, seed: int, max_steps: int = 10_000) -> list[float]:
    """The undiscounted return of each of `episodes` episodes; one that goes on for max_steps is cut there."""
    scores = []
    for number in range(episodes):
        state, _ = env.reset(seed=seed if number == 0 else None)
        score, length, last = 0.0, 0, False
        while not last and length < max_steps:
            state, reward, terminated, truncated, _ = env.step(act(state))
            score, length, last = score + float(reward), length + 1, terminated or truncated
        scores.append(score)
    return scores


def make_environment(name: str, *, limit: int = 500) -> Environment:
    """A gymnasium environment by its id; an unknown one, or one whose package is missing, is a `HanlinError`.

    limit: steps after which an episode is truncated where the environment has no limit of its own (CliffWalking, in
    which a random policy would walk for thousands).
    """
    gymnasium = require("gymnasium", "rl")
    try:
        spec = gymnasium.spec(name)
        return gymnasium.make(name, max_episode_steps=spec.max_episode_steps or limit)
    except (gymnasium.error.Error, ImportError) as error:
        raise HanlinError(
            f"There is no environment {name!r} here: {str(error).rstrip('.')}. Those that need nothing more: "
            "FrozenLake-v1, CliffWalking-v1, Taxi-v4, CartPole-v1, Acrobot-v1, MountainCar-v0."
        ) from error


def count_actions(env: Environment) -> int:
    """How many actions there are; a continuous action space is a `HanlinError`."""
    return _count(env.action_space, "actions", "every method here chooses among finitely many actions")


def count_states(env: Environment) -> int:
    """How many states there are; observations that are no single number are a `HanlinError`."""
    why = "a tabular method has one entry a state; dqn, reinforce, actor-critic and ppo take vectors"
    return _count(env.observation_space, "states", why)


def _count(space: Any, what: str, why: str) -> int:
    if not hasattr(space, "n") or int(getattr(space, "start", 0)) != 0 or getattr(space, "shape", ()) != ():
        raise HanlinError(f"The {what} of this environment are {space}, not numbers 0 to n - 1: {why}.")
    return int(space.n)
