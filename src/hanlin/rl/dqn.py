"""Deep Q-learning (Mnih et al., Nature 518, 2015) with double estimation (van Hasselt et al., arXiv:1509.06461).

    y    = r + gamma Q'(s', argmax_a Q(s', a)) (1 - terminated)        Q' is a copy of Q that is renewed now and then
    loss = Huber(Q(s, a) - y)

Q-learning with a network in the table's place diverges easily: neighbouring steps are alike and the target moves with
every update. The replay memory mixes steps of many episodes; the target network holds the target still; choosing the
action by one network and valuing it by the other takes the optimism out of the maximum. It still forgets: a network
that balances the pole for 500 steps may drop it 2,000 updates later. So the greedy policy is judged now and then in an
environment of its own, and the best network is the one that is kept.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hanlin.core.seeds import derive
from hanlin.rl.episodes import Environment, Episode, EpsilonGreedy, Linear, Step, Tally, count_actions, evaluate, walk
from hanlin.rl.networks import observation_encoder, perceptron


@dataclass(frozen=True)
class DQNSettings:
    """Defaults that learn CartPole-v1. After every `every` steps of acting come `updates` gradient steps.

    target_every: gradient steps between two copies to the target network. explore: share of the steps over which
    epsilon falls from 1 to `epsilon`. double: the online network chooses the action that the target network values.
    judge_every, judge_episodes: how often, and over how much, `learn` judges the greedy policy.
    """

    hidden: tuple[int, ...] = (256, 256)
    gamma: float = 0.99
    lr: float = 2.3e-3
    batch: int = 64
    memory: int = 50_000
    warm_up: int = 1_000
    every: int = 256
    updates: int = 128
    target_every: int = 100
    explore: float = 0.2
    epsilon: float = 0.04
    double: bool = True
    max_grad_norm: float = 10.0
    judge_every: int = 2_500
    judge_episodes: int = 10


class Replay:
    """The last `size` transitions in a ring; `sample` draws with replacement."""

    def __init__(self, size: int, width: int) -> None:
        self.states, self.following = torch.zeros(size, width), torch.zeros(size, width)
        self.actions, self.rewards = torch.zeros(size, dtype=torch.long), torch.zeros(size)
        self.terminated = torch.zeros(size)
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, len(self.actions))

    def add(self, state: Tensor, following: Tensor, step: Step) -> None:
        """Overwrite the oldest. `truncated` is not kept: such a step is like any other within an episode."""
        at = self.added % len(self.actions)
        self.states[at], self.following[at] = state, following
        self.actions[at], self.rewards[at], self.terminated[at] = step.action, step.reward, float(step.terminated)
        self.added += 1

    def sample(self, count: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """(states, actions, rewards, next states, terminated), each of `count` rows."""
        at = torch.from_numpy(rng.integers(len(self), size=count))
        return self.states[at], self.actions[at], self.rewards[at], self.following[at], self.terminated[at]


class DQN:
    """A Q network that learns while it acts. `learn` yields every finished episode; `act` is the best greedy policy.

    best: the mean return at which that policy was judged (-inf: not yet; `act` then follows the newest network).
    """

    def __init__(self, env: Environment, settings: DQNSettings = DQNSettings(), *, seed: int = 0) -> None:
        self.settings, self.seed = settings, seed
        width, self.encode = observation_encoder(env)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "weights"))
            self.online = perceptron(
                [width, *settings.hidden, count_actions(env)], activation=torch.nn.ReLU, last_gain=1.0
            )
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=settings.lr)
        self.replay = Replay(settings.memory, width)
        self.updates = 0
        self.kept, self.best = self.online, float("-inf")

    @torch.no_grad()
    def values(self, state: Any) -> np.ndarray:
        """Q(s, ·) (actions,)."""
        return self.online(self.encode([state]))[0].numpy()

    @torch.no_grad()
    def act(self, state: Any) -> int:
        return int(self.kept(self.encode([state]))[0].argmax())

    def judge(self, env: Environment) -> None:
        """Evaluate the newest network's greedy policy in `env`, and keep it if it is better than the one kept."""
        newest, seed = (lambda state: int(self.values(state).argmax())), derive(self.seed, "judge") % 2**31
        scores = evaluate(env, newest, episodes=self.settings.judge_episodes, seed=seed)
        if (score := sum(scores) / len(scores)) > self.best:
            self.kept, self.best = copy.deepcopy(self.online), score

    def learn(self, env: Environment, *, steps: int, judge: Environment | None = None) -> Iterator[Episode]:
        """Act for `steps` steps with falling epsilon, and learn from the memory between them.

        judge: another environment of the same kind, in which the greedy policy is judged.
        """
        s, tally = self.settings, Tally()
        rng = np.random.default_rng(derive(self.seed, "replay"))
        explore = EpsilonGreedy(
            self.values, Linear(1.0, s.epsilon, int(s.explore * steps)), np.random.default_rng(derive(self.seed, "act"))
        )
        loss = float("nan")
        for step in walk(env, explore, steps=steps, seed=self.seed):
            state, following = self.encode([step.state, step.next_state])
            self.replay.add(state, following, step)
            if len(self.replay) >= min(s.warm_up, s.memory) and self.replay.added % s.every == 0:
                loss = sum(self.update(rng) for _ in range(s.updates)) / s.updates
            if judge is not None and self.replay.added % s.judge_every == 0:
                self.judge(judge)
            if episode := tally.add(step, {"loss": loss, "epsilon": explore.epsilon.at(explore.step)}):
                yield episode

    def update(self, rng: np.random.Generator) -> float:
        """One gradient step on one sampled batch; the loss before it."""
        states, actions, rewards, following, terminated = self.replay.sample(self.settings.batch, rng)
        chosen = self.online(states).gather(1, actions[:, None])[:, 0]  # (batch,)
        loss = F.smooth_l1_loss(chosen, self.targets(rewards, following, terminated))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.online.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        if self.updates % self.settings.target_every == 0:
            self.target.load_state_dict(self.online.state_dict())
        return float(loss.detach())

    @torch.no_grad()
    def targets(self, rewards: Tensor, following: Tensor, terminated: Tensor) -> Tensor:
        """y of each row: (batch,), (batch, width), (batch,) -> (batch,)."""
        values = self.target(following)  # (batch, actions)
        chooser = self.online(following) if self.settings.double else values
        best = values.gather(1, chooser.argmax(-1, keepdim=True))[:, 0]
        return rewards + self.settings.gamma * (1 - terminated) * best
