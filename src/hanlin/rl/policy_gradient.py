"""Policy gradients: REINFORCE, actor-critic (A2C), PPO, as three settings of one update.

    grad J = E[ sum_t grad log pi(a_t|s_t) A_t ]        A_t says how much better the action was than the policy

    REINFORCE      A = G_t, the reward-to-go of a whole episode              Williams 1992
    actor-critic   A = GAE of a learnt V, over a few steps                   Mnih et al., arXiv:1602.01783
    PPO            the same, many epochs on one batch, with the ratio        Schulman et al., arXiv:1707.06347
                   pi / pi_old clipped: min(ratio A, clip(ratio, 1 +- c) A)

These are the advantages that the language models' alignment uses (`hanlin.rl.advantages`): a row is a stretch of one
episode. A stretch that was cut, by a time limit or by the horizon, goes on in V(s'); one that terminated does not.
The gamma^t before each term of the discounted gradient is left out, as everywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from hanlin.core.seeds import derive
from hanlin.rl.advantages import gae, reward_to_go
from hanlin.rl.episodes import Environment, Episode, Step, Tally, count_actions
from hanlin.rl.networks import Encode, observation_encoder, perceptron


@dataclass(frozen=True)
class PolicyGradientSettings:
    """envs: environments side by side. horizon: steps of each between two updates (None: one whole episode of each).

    clip: PPO's c (None: the plain gradient). critic: learn V and use GAE with `lam`; without, reward-to-go. whiten:
    advantages to mean 0 and deviation 1 over the batch. The learning rate falls to 0 over the run.
    """

    envs: int = 8
    horizon: int | None = 16
    hidden: tuple[int, ...] = (64, 64)
    gamma: float = 0.99
    lam: float = 0.95
    lr: float = 1e-3
    epochs: int = 1
    minibatch: int | None = None
    clip: float | None = None
    critic: bool = True
    value_weight: float = 0.5
    entropy: float = 0.0
    whiten: bool = True
    max_grad_norm: float = 0.5


@dataclass(frozen=True)
class Stretches:
    """What was seen, a row an unbroken stretch of one episode, padded on the right.

    states (rows, T, width), actions, rewards, mask (rows, T; bool), following (rows, width) the state after the last,
    terminated (rows,): nothing follows it.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    mask: Tensor
    following: Tensor
    terminated: Tensor


class PolicyGradient:
    """An actor and, with `critic`, a V network. `learn` yields finished episodes; `act` is the most likely action."""

    def __init__(self, env: Environment, settings: PolicyGradientSettings, *, seed: int = 0) -> None:
        self.settings, self.seed = settings, seed
        width, self.encode = observation_encoder(env)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "weights"))
            self.actor = perceptron([width, *settings.hidden, count_actions(env)], activation=nn.Tanh, last_gain=0.01)
            self.critic = perceptron([width, *settings.hidden, 1], activation=nn.Tanh, last_gain=1.0)
        self.generator = torch.Generator().manual_seed(derive(seed, "actions"))
        used = [*self.actor.parameters(), *(self.critic.parameters() if settings.critic else ())]
        self.optimizer = torch.optim.Adam(used, lr=settings.lr, eps=1e-5)

    @torch.no_grad()
    def act(self, state: Any) -> int:
        return int(self.actor(self.encode([state]))[0].argmax())

    @torch.no_grad()
    def sample(self, states: Tensor) -> list[int]:
        """An action drawn for each of states (n, width)."""
        chances = self.actor(states).softmax(-1)
        return torch.multinomial(chances, 1, generator=self.generator)[:, 0].tolist()

    def learn(self, envs: Sequence[Environment], *, steps: int) -> Iterator[Episode]:
        """Collect, update, and so on until all environments together made `steps` steps (the last batch is whole)."""
        walkers = [_Walker(env, derive(self.seed, "env", n) % 2**31) for n, env in enumerate(envs)]
        step = 0
        while step < steps:
            self.optimizer.param_groups[0]["lr"] = self.settings.lr * (1 - step / steps)
            batch, episodes = collect(walkers, self.sample, self.encode, self.settings.horizon, step)
            step += int(batch.mask.sum())
            metrics = self.update(batch)
            yield from (replace(episode, metrics=metrics) for episode in episodes)

    def update(self, batch: Stretches) -> dict[str, float]:
        """The gradient steps of one batch; the mean of each loss over them."""
        s, kept = self.settings, batch.mask
        advantages, returns = self.advantages(batch)
        if s.whiten:
            advantages = (advantages - advantages[kept].mean()) / (advantages[kept].std(correction=0) + 1e-8)
        states, actions = batch.states[kept], batch.actions[kept]  # (steps, width), (steps,)
        with torch.no_grad():
            old = Categorical(logits=self.actor(states)).log_prob(actions)
        advantages, returns = advantages[kept], returns[kept]
        sums: dict[str, float] = {}
        count = 0
        for _ in range(s.epochs):
            for part in torch.randperm(len(states), generator=self.generator).split(s.minibatch or len(states)):
                policy = Categorical(logits=self.actor(states[part]))
                loss = policy_loss(policy.log_prob(actions[part]), old[part], advantages[part], clip=s.clip)
                entropy = policy.entropy().mean()
                total, said = loss - s.entropy * entropy, {"policy_loss": loss, "entropy": entropy}
                if s.critic:
                    said["value_loss"] = (self.critic(states[part])[:, 0] - returns[part]).square().mean()
                    total = total + s.value_weight * said["value_loss"]
                self._step(total)
                count += 1
                sums = {name: sums.get(name, 0.0) + float(value.detach()) for name, value in said.items()}
        return {name: value / count for name, value in sums.items()}

    @torch.no_grad()
    def advantages(self, batch: Stretches) -> tuple[Tensor, Tensor]:
        """(advantages, returns), each (rows, T)."""
        s = self.settings
        if not s.critic:  # a truncated episode counts as it was seen: there is no V to go on in
            returns = reward_to_go(batch.rewards, batch.mask, gamma=s.gamma)
            return returns, returns
        values = self.critic(batch.states)[..., 0] * batch.mask  # (rows, T)
        beyond = self.critic(batch.following)[:, 0] * ~batch.terminated  # (rows,)
        return gae(batch.rewards, values, batch.mask, gamma=s.gamma, lam=s.lam, last_value=beyond)

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.settings.max_grad_norm)
        self.optimizer.step()


def policy_loss(logp: Tensor, old: Tensor, advantages: Tensor, *, clip: float | None) -> Tensor:
    """Mean over steps (n,) -> (): -log pi A, or with `clip` PPO's pessimistic surrogate of the ratio pi / pi_old."""
    if clip is None:
        return -(logp * advantages).mean()
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


class _Walker:
    """One environment and where it stands."""

    def __init__(self, env: Environment, seed: int) -> None:
        self.env, self.tally = env, Tally()
        self.state = env.reset(seed=seed)[0]

    def step(self, action: int) -> Step:
        following, reward, terminated, truncated, _ = self.env.step(action)
        step = Step(self.state, action, float(reward), following, bool(terminated), bool(truncated))
        self.state = self.env.reset()[0] if step.last else following
        return step


def collect(
    walkers: Sequence[_Walker], sample: Any, encode: Encode, horizon: int | None, done: int
) -> tuple[Stretches, list[Episode]]:
    """`horizon` steps of every walker side by side (None: until each ended an episode), and the episodes that ended.

    done: steps of the run before. The actions of all come from one forward pass.
    """
    paths: list[list[Step]] = [[] for _ in walkers]
    finished: list[list[Step]] = []
    episodes: list[Episode] = []
    going, made = list(range(len(walkers))), 0
    while going:
        actions = sample(encode([walkers[i].state for i in going]))
        for i, action in zip(going, actions, strict=True):
            step = walkers[i].step(action)
            paths[i].append(step)
            done += 1
            if episode := walkers[i].tally.add(step):
                episodes.append(replace(episode, step=done))
                finished.append(paths[i])
                paths[i] = []
        made += 1
        going = [i for i in going if paths[i]] if horizon is None else going if made < horizon else []
    return _pad([*finished, *(path for path in paths if path)], encode), episodes


def _pad(paths: Sequence[Sequence[Step]], encode: Encode) -> Stretches:
    def rows(values: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(values, batch_first=True)

    return Stretches(
        states=rows([encode([step.state for step in path]) for path in paths]),
        actions=rows([torch.tensor([step.action for step in path]) for path in paths]),
        rewards=rows([torch.tensor([step.reward for step in path]) for path in paths]),
        mask=rows([torch.ones(len(path), dtype=torch.bool) for path in paths]),
        following=encode([path[-1].next_state for path in paths]),
        terminated=torch.tensor([path[-1].terminated for path in paths]),
    )


METHODS = {  # that learn CartPole-v1 in seconds
    "reinforce": PolicyGradientSettings(horizon=None, critic=False, lr=3e-3),
    # horizon 8, gamma 0.98: 500 on seeds 0 to 3; horizon 16, gamma 0.99, lr 2e-3: 500, 154, 500, 288
    "actor-critic": PolicyGradientSettings(horizon=8, gamma=0.98, lam=1.0, lr=1e-3, entropy=0.01),
    "ppo": PolicyGradientSettings(
        horizon=32, gamma=0.98, lam=0.8, lr=1e-3, epochs=20, minibatch=256, clip=0.2
    ),
}  # fmt: skip
