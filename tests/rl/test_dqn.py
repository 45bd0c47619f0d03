"""DQN: its target by hand, its memory, the time limit, learning on a small MDP and on CartPole."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.rl.test_planning import random_mdp
from tests.rl.test_tabular import Confused, treadmill

from hanlin.rl.dqn import DQN, DQNSettings, Replay
from hanlin.rl.episodes import Step, evaluate, make_environment
from hanlin.rl.mdp import SampledMDP, deterministic
from hanlin.rl.planning import value_iteration

SMALL = DQNSettings(
    hidden=(32,), gamma=0.9, lr=3e-3, batch=32, memory=2_000, warm_up=64, every=8, updates=4, target_every=20
)


@pytest.mark.parametrize("double", [True, False])
def test_the_target_is_the_formula(double):
    """Row by row from the two networks' outputs; float32, 1e-6."""
    mdp = random_mdp(0)
    learner = DQN(SampledMDP(mdp), replace(SMALL, double=double), seed=0)
    learner.target = copy.deepcopy(learner.online)
    for weight in learner.target.parameters():
        weight.data += 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    following = torch.eye(6)
    rewards, terminated = torch.linspace(-1, 1, 6), torch.tensor([0.0, 1, 0, 0, 1, 0])
    found = learner.targets(rewards, following, terminated)
    disagree = 0
    for i in range(6):
        online, target = learner.online(following[i]), learner.target(following[i])
        disagree += int(online.argmax() != target.argmax())
        best = target[online.argmax()] if double else target.max()
        wanted = rewards[i] + (0.9 * best if terminated[i] == 0 else 0.0)
        assert found[i].item() == pytest.approx(wanted.item(), abs=1e-6)
    assert disagree  # else both forms would be the same
    assert found[1] == rewards[1] and found[4] == rewards[4]


def test_the_memory_is_a_ring_that_does_not_know_truncation():
    memory = Replay(4, 1)
    for n in range(6):
        memory.add(torch.tensor([n]), torch.tensor([n + 1]), Step(n, n % 2, float(n), n + 1, n == 4, n == 5))
    assert len(memory) == 4 and memory.states[:, 0].tolist() == [4, 5, 2, 3]
    states, actions, rewards, following, terminated = memory.sample(200, np.random.default_rng(0))
    assert set(states[:, 0].tolist()) == {2, 3, 4, 5}
    assert torch.equal(states[:, 0], rewards) and torch.equal(following, states + 1)
    assert torch.equal(actions, states[:, 0].long() % 2)
    assert torch.equal(terminated == 1, states[:, 0] == 4)


def test_the_target_network_stands_still_between_two_copies():
    learner = DQN(SampledMDP(random_mdp(0)), replace(SMALL, target_every=3), seed=0)
    list(learner.learn(SampledMDP(random_mdp(0)), steps=60))  # below the warm-up: only fills the memory
    assert learner.updates == 0
    rng = np.random.default_rng(0)

    def same() -> bool:
        pairs = zip(learner.online.parameters(), learner.target.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    seen = []
    for _ in range(6):
        learner.update(rng)
        seen.append(same())
    assert seen == [False, False, True, False, False, True]


def test_a_time_limit_is_no_end():
    """The treadmill: Q = 10. Reported as an end, every fifth target is 1, and Huber's balance of slopes (one in five at
    -1, four in five at 1 + gamma Q - Q) lies at 1 + 0.9 Q - Q = 1/4: Q = 7.5."""
    found = []
    for env in (treadmill(), Confused(treadmill().mdp, max_steps=5)):
        learner = DQN(env, replace(SMALL, lr=0.01), seed=0)
        list(learner.learn(env, steps=2_000))
        found.append(float(learner.values(0)[0]))
    assert found[0] == pytest.approx(10, abs=0.5)
    assert found[1] == pytest.approx(7.5, abs=0.5)


def test_a_small_mdp_is_learnt_and_the_run_repeats():
    """The greedy policy is worth 97 % of what lies between the uniform policy and the best."""
    mdp = random_mdp(6, states=4, actions=3, gamma=0.9, end=0.2)
    runs = []
    for noise in (0, 3):
        learner = DQN(SampledMDP(mdp), SMALL, seed=0)
        torch.rand(noise)
        runs.append((list(learner.learn(SampledMDP(mdp), steps=2_500)), [learner.act(s) for s in range(4)]))
    assert runs[0][1] == runs[1][1]
    assert [e.score for e in runs[0][0]] == [e.score for e in runs[1][0]]
    best = mdp.expected(value_iteration(mdp).V)
    uniform = mdp.expected(mdp.value(torch.full((4, 3), 1 / 3, dtype=torch.float64)))
    reached = mdp.expected(mdp.value(deterministic(torch.tensor(runs[0][1]), 3)))
    assert reached >= best - 0.03 * (best - uniform)


def test_the_best_network_is_kept_when_a_later_one_is_worse():
    mdp = random_mdp(6, states=4, actions=3, gamma=0.9, end=0.2)
    learner = DQN(SampledMDP(mdp), replace(SMALL, judge_episodes=200), seed=0)
    assert learner.kept is learner.online
    list(learner.learn(SampledMDP(mdp), steps=2_000))
    learner.judge(SampledMDP(mdp))
    good, best = [learner.act(s) for s in range(4)], learner.best
    with torch.no_grad():
        for weight in learner.online[-1].parameters():
            weight.neg_()  # the worst action everywhere
    learner.judge(SampledMDP(mdp))
    assert learner.best == best and [learner.act(s) for s in range(4)] == good
    assert [int(learner.values(s).argmax()) for s in range(4)] != good


@pytest.mark.slow
def test_cart_pole_is_learnt():
    """The best policy's mean over 50 new episodes is 475 or more. A run ends once it was judged so."""
    pytest.importorskip("gymnasium")
    learner = DQN(make_environment("CartPole-v1"), seed=0)
    for _ in learner.learn(make_environment("CartPole-v1"), steps=50_000, judge=make_environment("CartPole-v1")):
        if learner.best >= 495:
            break
    assert np.mean(evaluate(make_environment("CartPole-v1"), learner.act, episodes=50, seed=1234)) >= 475
