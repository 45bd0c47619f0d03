"""Tabular learning against exact values: prediction within its confidence bounds, control to value iteration's return,
and the trap that a time limit is taken for the end."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from tests.rl.test_planning import random_mdp, random_policy

from hanlin.core.errors import HanlinError
from hanlin.rl import tabular
from hanlin.rl.episodes import EpsilonGreedy, Linear, count_states, evaluate, make_environment, walk
from hanlin.rl.mdp import MDP, SampledMDP, deterministic, read_mdp
from hanlin.rl.planning import value_iteration
from hanlin.rl.tabular import StepSize


def finish(episodes) -> list:
    return list(episodes)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


# --- prediction


@pytest.mark.parametrize("first_visit", [True, False])
def test_monte_carlo_averages_the_returns_that_followed(first_visit):
    """Equal to 1e-12 to the mean that a plain second look at the same walk gives."""
    mdp = random_mdp(0, end=0.2)
    policy, V = random_policy(mdp, 1), zeros(mdp.states)
    common = {"gamma": 0.9, "steps": 2000, "seed": 3}
    finish(tabular.predict_monte_carlo(SampledMDP(mdp), V, policy, first_visit=first_visit, **common))
    returns, path = defaultdict(list), []
    for step in walk(SampledMDP(mdp), tabular._follow(policy, 3), steps=2000, seed=3):
        path.append(step)
        if step.last:
            for i, visit in enumerate(path):
                if not (first_visit and visit.state in [s.state for s in path[:i]]):
                    returns[visit.state].append(sum(0.9**k * s.reward for k, s in enumerate(path[i:])))
            path = []
    assert V.tolist() == pytest.approx([np.mean(returns[s]) for s in range(mdp.states)], abs=1e-12)


def test_first_visit_monte_carlo_converges_within_the_central_limit():
    """Returns of first visits are independent: the mean of n is within 4 standard errors of the exact V."""
    mdp = random_mdp(0, states=4, end=0.25)
    policy = random_policy(mdp, 1)
    V, exact, n = zeros(4), mdp.value(policy), 20_000
    second = _second_moment(mdp, policy, exact)
    finish(tabular.predict_monte_carlo(SampledMDP(mdp), V, policy, gamma=0.9, steps=n, seed=0))
    visits = n * 0.25 / 4  # at least: the episodes that start in a state
    assert ((V - exact).abs() < 4 * ((second - exact**2) / visits).sqrt()).all()
    assert (exact.abs() > 20 * (V - exact).abs()).any()  # the bound is not wide as the world


def _second_moment(mdp: MDP, policy: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """E[G^2] solves M = E[r^2] + 2 gamma E[r V(s')] + gamma^2 P M."""
    P = torch.einsum("sa,sat->st", policy, mdp.P)
    known = (policy * (mdp.R**2 + 2 * mdp.gamma * mdp.R * (mdp.P @ V))).sum(-1)
    return torch.linalg.solve(torch.eye(mdp.states, dtype=P.dtype) - mdp.gamma**2 * P, known)


@pytest.mark.parametrize("method", ["td0", "every visit"])
def test_the_mean_over_runs_is_the_exact_value(method):
    """Twelve independent runs: their mean within 4.5 of its own standard errors (and 0.01 for the rest of V = 0)."""
    mdp = random_mdp(2, states=3, end=0.25)
    policy = random_policy(mdp, 1)
    exact, found = mdp.value(policy), zeros(12, 3)
    for seed, V in enumerate(found):
        common = {"gamma": 0.9, "steps": 2500, "seed": seed}
        if method == "td0":
            finish(tabular.predict_td0(SampledMDP(mdp), V, policy, **common))
        else:
            finish(tabular.predict_monte_carlo(SampledMDP(mdp), V, policy, first_visit=False, **common))
    error = found.std(0) / 12**0.5
    assert ((found.mean(0) - exact).abs() < 4.5 * error + 0.01).all()
    assert error.max() < 0.05


# --- truncation is not termination


def treadmill(*, limit: int = 5) -> SampledMDP:
    """One state, reward 1 for ever: V = 1 / (1 - gamma) = 10. The watch ends after `limit` steps."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return SampledMDP(MDP(one, one[0], 0.9, one[0, 0]), max_steps=limit)


class Confused(SampledMDP):
    """The mistake: a time limit reported as the end of the world."""

    def step(self, action):
        state, reward, terminated, truncated, facts = super().step(action)
        return state, reward, terminated or truncated, False, facts


def confused() -> Confused:
    env = treadmill()
    return Confused(env.mdp, max_steps=env.max_steps)


ALL = Linear(1.0, 1.0, 1)
LEARNERS = {
    "first visit": lambda env, V, steps: tabular.predict_monte_carlo(
        env, V, torch.ones(1, 1, dtype=torch.float64), gamma=0.9, steps=steps, seed=0, step_size=StepSize(0.1, 0)
    ),
    "every visit": lambda env, V, steps: tabular.predict_monte_carlo(
        env, V, torch.ones(1, 1, dtype=torch.float64), gamma=0.9, steps=steps, seed=0, step_size=StepSize(0.1, 0),
        first_visit=False,
    ),
    "td0": lambda env, V, steps: tabular.predict_td0(
        env, V, torch.ones(1, 1, dtype=torch.float64), gamma=0.9, steps=steps, seed=0, step_size=StepSize(0.1, 0)
    ),
    "monte-carlo": lambda env, V, steps: tabular.monte_carlo(
        env, V.view(1, 1), gamma=0.9, steps=steps, seed=0, epsilon=ALL, step_size=StepSize(0.1, 0)
    ),
    "sarsa": lambda env, V, steps: tabular.sarsa(env, V.view(1, 1), gamma=0.9, steps=steps, seed=0, epsilon=ALL),
    "q-learning": lambda env, V, steps: tabular.q_learning(
        env, V.view(1, 1), gamma=0.9, steps=steps, seed=0, epsilon=ALL
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_a_truncated_episode_goes_on_and_a_terminated_one_does_not(name):
    V, wrong = zeros(1), zeros(1)
    finish(LEARNERS[name](treadmill(), V, 3000))
    finish(LEARNERS[name](confused(), wrong, 3000))
    assert V.item() == pytest.approx(10, abs=1e-3)
    assert wrong.item() < 5  # the return of five steps is 4.1


def test_the_wrong_value_is_the_one_that_the_mistake_predicts():
    """TD(0) with every fifth step an end: V = 1 + gamma (4/5) V, on average over the cycle."""
    wrong = zeros(1)
    finish(
        tabular.predict_td0(
            confused(), wrong, torch.ones(1, 1, dtype=torch.float64), gamma=0.9, steps=40_000, seed=0,
            step_size=StepSize(1.0, 0.8),
        )
    )  # fmt: skip
    assert wrong.item() == pytest.approx(1 / (1 - 0.9 * 0.8), abs=0.02)


# --- control


@pytest.mark.parametrize(
    ("name", "method", "steps", "epsilon", "step_size", "share"),
    [
        ("FrozenLake-v1", "q_learning", 60_000, (1.0, 0.05), (1.0, 0.6), 0.95),
        ("FrozenLake-v1", "sarsa", 60_000, (1.0, 0.01), (1.0, 0.6), 0.95),
        ("CliffWalking-v1", "q_learning", 20_000, (1.0, 0.0), (0.1, 0.0), 1.0),
        ("CliffWalking-v1", "sarsa", 20_000, (0.0, 0.0), (0.5, 0.0), 1.0),
    ],
)
def test_control_reaches_value_iterations_return(name, method, steps, epsilon, step_size, share):
    """The greedy policy's exact value: all of the optimum along the cliff, 95 % on the ice, where chance rules.

    SARSA learns the policy that explores, so on the cliff it must not; zeros promise more than the -1 of every step
    and send it everywhere by themselves.
    """
    pytest.importorskip("gymnasium")
    env = make_environment(name)
    mdp = read_mdp(env, gamma=0.99)
    Q = zeros(mdp.states, mdp.actions)
    explore = Linear(*epsilon, int(0.8 * steps))
    learn = getattr(tabular, method)
    finish(learn(env, Q, gamma=0.99, steps=steps, seed=0, epsilon=explore, step_size=StepSize(*step_size)))
    best = mdp.expected(value_iteration(mdp).V)
    reached = mdp.expected(mdp.value(deterministic(tabular.greedy(Q), mdp.actions)))
    assert reached == pytest.approx(best, abs=(1 - share) * abs(best) + 1e-9)


def test_sarsa_that_explores_keeps_away_from_the_cliff_and_q_learning_does_not():
    """Sutton and Barto's example 6.6: epsilon stays at 0.1."""
    pytest.importorskip("gymnasium")
    best = {}
    for method in (tabular.sarsa, tabular.q_learning):
        env = make_environment("CliffWalking-v1")
        Q = zeros(48, 4)
        scores = [
            e.score for e in method(env, Q, gamma=1.0, steps=40_000, seed=1, epsilon=Linear(0.1, 0.1, 1),
                                    step_size=StepSize(0.5, 0))
        ]  # fmt: skip
        path = evaluate(env, tabular.greedy(Q).tolist().__getitem__, episodes=1, seed=0)[0]
        best[method.__name__] = (np.mean(scores[-300:]), path)
    assert best["q_learning"][1] == -13
    assert best["sarsa"][1] < -13
    assert best["sarsa"][0] > best["q_learning"][0] + 5


def test_monte_carlo_control_finds_the_best_policy_of_a_small_mdp():
    mdp = random_mdp(6, states=3, actions=2, end=0.3, gamma=0.8)
    Q = zeros(3, 2)
    finish(tabular.monte_carlo(SampledMDP(mdp), Q, gamma=0.8, steps=20_000, seed=0, epsilon=Linear(1.0, 0.05, 15_000)))
    assert torch.equal(tabular.greedy(Q), value_iteration(mdp).actions)


def test_a_run_repeats_and_can_be_left_at_any_episode():
    mdp = random_mdp(0)
    first, again, left = zeros(6, 3), zeros(6, 3), zeros(6, 3)
    common = {"gamma": 0.9, "seed": 4, "epsilon": Linear(1.0, 0.1, 300)}
    whole = finish(tabular.q_learning(SampledMDP(mdp), first, steps=600, **common))
    assert finish(tabular.q_learning(SampledMDP(mdp), again, steps=600, **common)) == whole
    assert torch.equal(first, again)
    episodes = tabular.q_learning(SampledMDP(mdp), left, steps=600, **common)
    assert [next(episodes) for _ in range(3)] == whole[:3]
    assert left.abs().sum() > 0
    assert sum(e.length for e in whole) == whole[-1].step <= 600


def test_epsilon_greedy_explores_as_often_as_it_says_and_breaks_ties_evenly():
    act = EpsilonGreedy(lambda state: np.array([1.0, 3.0, 3.0]), Linear(0.3, 0.3, 1), np.random.default_rng(0))
    shares = np.bincount([act(None) for _ in range(6000)], minlength=3) / 6000
    assert shares == pytest.approx([0.1, 0.45, 0.45], abs=0.025)
    assert [Linear(1.0, 0.0, 4).at(step) for step in (0, 1, 4, 9)] == [1.0, 0.75, 0.0, 0.0]


def test_a_table_of_an_environment_without_numbered_states_is_refused():
    pytest.importorskip("gymnasium")
    for name in ("CartPole-v1", "Blackjack-v1"):
        with pytest.raises(HanlinError, match=r"not numbers 0 to n - 1: a tabular method has one entry a state"):
            count_states(make_environment(name))
