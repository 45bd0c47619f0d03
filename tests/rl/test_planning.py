"""Planning: the exact value, Bellman's operators, value and policy iteration, gymnasium's tables."""

import itertools

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.rl.mdp import MDP, SampledMDP, deterministic, from_table, read_mdp, soften
from hanlin.rl.planning import expectation_backup, greedy_actions, optimality_backup, policy_iteration, value_iteration


def random_mdp(seed: int, *, states: int = 6, actions: int = 3, gamma: float = 0.9, end: float = 0.1) -> MDP:
    """Every transition possible; each step ends the episode with probability `end`."""
    torch.manual_seed(seed)
    P = torch.rand(states, actions, states, dtype=torch.float64)
    R = torch.randn(states, actions, dtype=torch.float64)
    start = torch.full((states,), 1 / states, dtype=torch.float64)
    return MDP((1 - end) * P / P.sum(-1, keepdim=True), R, gamma, start)


def random_policy(mdp: MDP, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.rand(mdp.states, mdp.actions, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("seed", range(5))
def test_the_value_of_a_policy_is_the_fixed_point_and_the_sum_of_discounted_rewards(seed):
    mdp = random_mdp(seed)
    policy = random_policy(mdp, seed + 100)
    V = mdp.value(policy)
    assert (expectation_backup(mdp, policy, V) - V).abs().max() < 1e-10
    P = torch.stack([sum(policy[s, a] * mdp.P[s, a] for a in range(mdp.actions)) for s in range(mdp.states)])
    R = torch.tensor([float(policy[s] @ mdp.R[s]) for s in range(mdp.states)], dtype=torch.float64)
    series, term = torch.zeros_like(R), R
    for _ in range(400):  # (gamma 0.9)^400 is nothing
        series, term = series + term, mdp.gamma * P @ term
    assert (series - V).abs().max() < 1e-10


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_every_sweep_shrinks_the_distance_by_gamma(gamma):
    """Of two arbitrary value functions, and of value iteration's own changes."""
    mdp = random_mdp(1, gamma=gamma, end=0.0)
    policy = random_policy(mdp, 2)
    for seed in range(20):
        torch.manual_seed(seed)
        V, W = 10 * torch.randn(2, mdp.states, dtype=torch.float64)
        apart = float((V - W).abs().max())
        assert (optimality_backup(mdp, V) - optimality_backup(mdp, W)).abs().max() <= gamma * apart + 1e-12
        both = expectation_backup(mdp, policy, V) - expectation_backup(mdp, policy, W)
        assert both.abs().max() <= gamma * apart + 1e-12
    changes = value_iteration(mdp).changes
    assert len(changes) > 10
    assert all(after <= gamma * before + 1e-13 for before, after in itertools.pairwise(changes))


@pytest.mark.parametrize("seed", range(5))
def test_policy_iteration_is_value_iteration_is_the_best_of_all_policies(seed):
    mdp = random_mdp(seed, states=4, actions=3)
    swept, improved = value_iteration(mdp), policy_iteration(mdp)
    every = [
        mdp.value(deterministic(torch.tensor(actions), mdp.actions))
        for actions in itertools.product(range(mdp.actions), repeat=mdp.states)
    ]
    best = torch.stack(every).amax(0)
    assert (swept.V - best).abs().max() < 1e-10
    assert (improved.V - best).abs().max() < 1e-10
    assert torch.equal(swept.actions, improved.actions)
    assert (mdp.value(deterministic(swept.actions, mdp.actions)) - best).abs().max() < 1e-10


def test_value_iteration_stops_within_its_tolerance():
    mdp = random_mdp(3, gamma=0.99, end=0.0)
    exact = policy_iteration(mdp).V
    for tolerance in (1e-1, 1e-4, 1e-8):
        plan = value_iteration(mdp, tolerance=tolerance)
        assert (plan.V - exact).abs().max() <= tolerance
    assert len(value_iteration(mdp, tolerance=1e-1).changes) < len(value_iteration(mdp, tolerance=1e-8).changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("FrozenLake-v1", 0.542025932), ("CliffWalking-v1", -sum(0.99**t for t in range(13))), ("Taxi-v4", None)],
)
def test_toy_text_tables_are_read_and_solved(name, value):
    """FrozenLake's 0.5420 is the literature's value at gamma 0.99; along the cliff the shortest way is 13 steps."""
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make(name)
    mdp = read_mdp(env, gamma=0.99)
    assert (mdp.states, mdp.actions) == (env.observation_space.n, env.action_space.n)
    swept, improved = value_iteration(mdp), policy_iteration(mdp)
    assert (swept.V - improved.V).abs().max() < 1e-9
    assert torch.equal(swept.actions, improved.actions)
    if value is not None:
        assert mdp.expected(swept.V) == pytest.approx(value, abs=1e-8)


def test_an_undiscounted_value_exists_where_the_episode_ends():
    """The cliff at gamma 1: 13 steps at -1 each; a policy that stands before a wall for ever has no value."""
    gymnasium = pytest.importorskip("gymnasium")
    mdp = read_mdp(gymnasium.make("CliffWalking-v1"), gamma=1.0)
    assert mdp.expected(value_iteration(mdp).V) == pytest.approx(-13, abs=1e-9)
    assert mdp.value(soften(deterministic(value_iteration(mdp).actions, 4), 0.1)).isfinite().all()
    with pytest.raises(HanlinError, match="may never end"):
        mdp.value(deterministic(torch.full((48,), 3), 4))


def test_what_a_table_says_of_leaving_the_goal_is_dropped():
    table = {
        0: {0: [(0.5, 0, -1.0, False), (0.5, 1, 2.0, True)]},
        1: {0: [(1.0, 0, 100.0, False)]},
    }
    mdp = from_table(table, [1.0, 0.0], gamma=0.5)
    assert mdp.value(torch.ones(2, 1, dtype=torch.float64)).tolist() == pytest.approx([0.5 / (1 - 0.25), 0.0])


def test_ties_are_broken_by_the_first_action():
    mdp = random_mdp(0)
    same = MDP(mdp.P[:, :1].repeat(1, 3, 1), mdp.R[:, :1].repeat(1, 3), 0.9, mdp.start)
    assert greedy_actions(same, torch.randn(6, dtype=torch.float64)).tolist() == [0] * 6
    assert policy_iteration(same).changes == ()


def test_a_sampled_mdp_is_distributed_as_the_mdp():
    """4000 steps of one state and action: every frequency within 4 standard errors, the end among them."""
    mdp = random_mdp(4, states=3, end=0.25)
    env = SampledMDP(mdp)
    seen = torch.zeros(4)
    env.reset(seed=5)
    tries = 4000
    for _ in range(tries):
        env._state = 1
        state, reward, terminated, truncated, _ = env.step(2)
        assert reward == mdp.R[1, 2] and not truncated
        seen[3 if terminated else state] += 1
    chances = torch.cat([mdp.P[1, 2], torch.tensor([0.25], dtype=torch.float64)])
    assert ((seen / tries - chances).abs() < 4 * (chances * (1 - chances) / tries).sqrt()).all()
    first = [env.reset(seed=1)[0], *(env.step(0)[:3] for _ in range(5))]
    assert first == [env.reset(seed=1)[0], *(env.step(0)[:3] for _ in range(5))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gamma": 1.5}, "between 0 and 1"),
        ({"start": torch.ones(6, dtype=torch.float64)}, "start sum to 1"),
        ({"start": torch.ones(5, dtype=torch.float64)}, r"needs P \(6, 3, 6\)"),
        ({"P": 2 * random_mdp(0).P}, "sum to at most 1"),
    ],
)
def test_what_is_no_mdp_is_refused(change, said):
    mdp = random_mdp(0)
    with pytest.raises(HanlinError, match=said):
        MDP(**({"P": mdp.P, "R": mdp.R, "gamma": 0.9, "start": mdp.start} | change))


def test_an_environment_without_a_table_and_an_endless_sum_are_refused():
    gymnasium = pytest.importorskip("gymnasium")
    with pytest.raises(HanlinError, match=r"CartPole-v1 publishes no transition table.*FrozenLake-v1"):
        read_mdp(gymnasium.make("CartPole-v1"), gamma=0.9)
    mdp = random_mdp(0, end=0.0, gamma=1.0)
    with pytest.raises(HanlinError, match="still changes V by"):
        value_iteration(MDP(mdp.P, mdp.R.abs(), 1.0, mdp.start), max_sweeps=50)
