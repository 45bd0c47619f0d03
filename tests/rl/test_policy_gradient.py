"""Policy gradients: the gradient by enumeration, clipping, cut stretches, learning on a small MDP and on CartPole."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.rl.test_planning import random_mdp
from tests.rl.test_tabular import Confused, treadmill

from hanlin.core.errors import HanlinError
from hanlin.rl.episodes import Step, count_actions, evaluate, make_environment
from hanlin.rl.mdp import MDP, SampledMDP, deterministic
from hanlin.rl.networks import observation_encoder
from hanlin.rl.planning import value_iteration
from hanlin.rl.policy_gradient import (
    METHODS,
    PolicyGradient,
    PolicyGradientSettings,
    _pad,
    _Walker,
    collect,
    policy_loss,
)

PLAIN = PolicyGradientSettings(horizon=None, critic=False, whiten=False, hidden=(8,), gamma=1.0, envs=1)


def two_steps(seed: int) -> MDP:
    """States 0, then 1 or 2, then the end: 2 x 2 choices of action and the chance between make eight episodes."""
    torch.manual_seed(seed)
    P = torch.zeros(3, 2, 3, dtype=torch.float64)
    P[0, :, 1] = torch.tensor([0.3, 0.8], dtype=torch.float64)
    P[0, :, 2] = 1 - P[0, :, 1]
    return MDP(P, torch.randn(3, 2, dtype=torch.float64), 1.0, torch.tensor([1.0, 0, 0], dtype=torch.float64))


def gradient_of(learner: PolicyGradient, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(learner.actor.parameters()))])


@pytest.mark.parametrize("seed", range(3))
def test_reinforces_expected_gradient_is_the_gradient_of_the_value(seed):
    """All eight episodes, weighted by their probability, against autograd through the exact value; float64, 1e-12."""
    mdp = two_steps(seed)
    learner = PolicyGradient(SampledMDP(mdp), PLAIN, seed=seed)
    learner.actor.double()
    with torch.no_grad():
        learner.actor[-1].weight.mul_(100)  # away from the uniform start
    states = torch.eye(3, dtype=torch.float64)
    chances = learner.actor(states).softmax(-1)
    exact = gradient_of(learner, mdp.start @ mdp.value(chances))
    expected = torch.zeros_like(exact)
    for a0, s1, a1 in itertools.product((0, 1), (1, 2), (0, 1)):
        probability = float((chances[0, a0] * mdp.P[0, a0, s1] * chances[s1, a1]).detach())
        path = [
            Step(0, a0, float(mdp.R[0, a0]), s1, False, False),
            Step(s1, a1, float(mdp.R[s1, a1]), s1, True, False),
        ]
        batch = _pad([path], lambda rows: states[list(rows)])
        batch = replace(batch, rewards=torch.tensor([[s.reward for s in path]], dtype=torch.float64))
        advantages, _ = learner.advantages(batch)
        logp = learner.actor(batch.states[0]).log_softmax(-1).gather(1, batch.actions[0][:, None])[:, 0]
        loss = policy_loss(logp, logp.detach(), advantages[0], clip=None)
        expected -= probability * 2 * gradient_of(learner, loss)  # the loss is a mean over the two steps
    assert exact.abs().max() > 1e-3
    assert (expected - exact).abs().max() < 1e-12


def test_ppo_is_the_plain_gradient_at_ratio_one_and_flat_where_it_is_clipped():
    torch.manual_seed(0)
    logp = torch.randn(6, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(6, dtype=torch.float64)
    plain = torch.autograd.grad(policy_loss(logp, logp.detach(), advantages, clip=None), logp)[0]
    clipped = torch.autograd.grad(policy_loss(logp, logp.detach(), advantages, clip=0.2), logp)[0]
    assert (plain - clipped).abs().max() < 1e-15
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9], dtype=torch.float64)
    sign = torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64)
    new = ratio.log().requires_grad_()
    gradient = torch.autograd.grad(policy_loss(new, torch.zeros(6, dtype=torch.float64), sign, clip=0.2), new)[0]
    # Good and already likelier, bad and already rarer: no push. In all other cases the pull back stays.
    assert (gradient != 0).tolist() == [False, True, True, False, True, True]
    assert gradient[gradient != 0].tolist() == pytest.approx((-(ratio * sign) / 6)[gradient != 0].tolist())


# --- stretches


def test_stretches_are_the_steps_in_order_and_know_how_they_stopped():
    """Three environments of episodes of 5, cut after 7: each gives a truncated stretch of 5 and an open one of 2."""
    envs = [treadmill() for _ in range(3)]
    walkers = [_Walker(env, n) for n, env in enumerate(envs)]
    _, encode = observation_encoder(envs[0])
    batch, episodes = collect(walkers, lambda states: [0] * len(states), encode, 7, 100)
    assert batch.mask.sum(1).tolist() == [5, 5, 5, 2, 2, 2]
    assert not batch.terminated.any()
    assert [(e.length, e.score) for e in episodes] == [(5, 5.0)] * 3
    assert [e.step for e in episodes] == [113, 114, 115]
    whole, _ = collect([_Walker(treadmill(), 0)], lambda states: [0] * len(states), encode, None, 0)
    assert whole.mask.sum(1).tolist() == [5]


def test_advantages_go_on_in_the_value_of_a_cut_stretch_only():
    """lam = 1: A + V is the discounted return plus gamma^n V(s') where the stretch was cut, without it at an end."""
    mdp = random_mdp(0, states=4, end=0.2)
    env = SampledMDP(mdp, max_steps=6)
    learner = PolicyGradient(env, replace(PLAIN, critic=True, horizon=9, gamma=0.9, lam=1.0), seed=0)
    walkers = [_Walker(SampledMDP(mdp, max_steps=6), n) for n in range(4)]
    batch, _ = collect(walkers, learner.sample, learner.encode, 9, 0)
    assert batch.terminated.any() and (~batch.terminated).any()
    _, returns = learner.advantages(batch)
    for row in range(len(batch.mask)):
        n = int(batch.mask[row].sum())
        tail = 0.0 if batch.terminated[row] else learner.critic(batch.following[row]).item()
        for t in range(n):
            rewards = batch.rewards[row, t:n]
            wanted = float(sum(0.9**k * r for k, r in enumerate(rewards))) + 0.9 ** (n - t) * tail
            assert returns[row, t].item() == pytest.approx(wanted, abs=1e-5)


def test_the_critic_learns_that_a_time_limit_is_no_end():
    """The treadmill again: V = 10, but less than 6 where truncation is reported as termination."""
    found = []
    for kind in (treadmill, lambda: Confused(treadmill().mdp, max_steps=5)):
        settings = replace(METHODS["actor-critic"], gamma=0.9, lam=0.9, horizon=32, hidden=(8,), envs=2, lr=0.03)
        learner = PolicyGradient(kind(), settings, seed=0)
        list(learner.learn([kind(), kind()], steps=6_000))
        found.append(learner.critic(torch.ones(1, 1)).item())
    assert found[0] == pytest.approx(10, abs=0.5)
    assert found[1] < 6


# --- learning


@pytest.mark.parametrize("method", METHODS)
def test_a_small_mdp_is_learnt(method):
    """The greedy policy is worth 97 % of what lies between the uniform policy and the best."""
    mdp = random_mdp(6, states=4, actions=3, gamma=0.9, end=0.2)
    settings = replace(METHODS[method], gamma=0.9, hidden=(16,), lr=0.01, epochs=min(4, METHODS[method].epochs))
    learner = PolicyGradient(SampledMDP(mdp), settings, seed=0)
    envs = [SampledMDP(mdp) for _ in range(settings.envs)]
    episodes = list(learner.learn(envs, steps=6_000))
    actions = torch.tensor([learner.act(s) for s in range(4)])
    best = mdp.expected(value_iteration(mdp).V)
    uniform = mdp.expected(mdp.value(torch.full((4, 3), 1 / 3, dtype=torch.float64)))
    reached = mdp.expected(mdp.value(deterministic(actions, 3)))
    assert reached >= best - 0.03 * (best - uniform)
    assert episodes[-1].metrics["entropy"] < episodes[0].metrics["entropy"]
    assert [e.step for e in episodes] == sorted(e.step for e in episodes)


def test_a_run_repeats_whatever_else_draws_from_torch():
    mdp = random_mdp(0)
    found = []
    for noise in (0, 5):
        learner = PolicyGradient(SampledMDP(mdp), METHODS["ppo"], seed=3)
        torch.rand(noise)
        found.append(list(learner.learn([SampledMDP(mdp) for _ in range(2)], steps=200)))
    assert found[0] == found[1]


def test_a_continuous_action_space_and_unknown_observations_are_refused():
    pytest.importorskip("gymnasium")
    with pytest.raises(HanlinError, match="every method here chooses among finitely many"):
        count_actions(make_environment("Pendulum-v1"))
    with pytest.raises(HanlinError, match="a network here takes numbers or arrays"):
        observation_encoder(make_environment("Blackjack-v1"))
    with pytest.raises(HanlinError, match="There is no environment 'CartPoll-v1' here"):
        make_environment("CartPoll-v1")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "steps"), [("reinforce", 150_000), ("actor-critic", 150_000), ("ppo", 60_000)])
def test_cart_pole_is_learnt(method, steps):
    """The greedy policy's mean over 50 new episodes is 475 or more: what gymnasium calls solved."""
    pytest.importorskip("gymnasium")
    env = make_environment("CartPole-v1")
    learner = PolicyGradient(env, METHODS[method], seed=0)
    envs = [make_environment("CartPole-v1") for _ in range(METHODS[method].envs)]
    list(learner.learn(envs, steps=steps))
    assert np.mean(evaluate(env, learner.act, episodes=50, seed=1234)) >= 475
