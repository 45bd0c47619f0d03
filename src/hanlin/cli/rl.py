"""`hanlin rl ENV --method METHOD`: reinforcement learning on small environments, from Bellman's equation to PPO."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import count, make_parser, whole
from hanlin.core.errors import HanlinError
from hanlin.core.progress import Progress, say

if TYPE_CHECKING:
    from torch import Tensor

    from hanlin.rl.episodes import Act, Episode

PLANNING = ("value-iteration", "policy-iteration")
TABULAR = ("monte-carlo", "td0", "sarsa", "q-learning")
DEEP = ("dqn", "reinforce", "actor-critic", "ppo")
STEPS = dict.fromkeys(TABULAR, 200_000) | {"dqn": 50_000, "reinforce": 150_000, "actor-critic": 150_000, "ppo": 60_000}
ROWS = 200  # lines of metrics.jsonl, points of the curve
TEST_EPISODES = 100


def main(argv: list[str]) -> None:
    """Run `hanlin rl`. The table goes to stdout, progress to stderr; Ctrl-C keeps and draws what was learnt so far."""
    parser = make_parser(
        "rl",
        "Reinforcement learning on a small gymnasium environment: plan where the model is known, else learn from\n"
        "samples. Tables need numbered states (FrozenLake-v1, CliffWalking-v1, Taxi-v4), networks take vectors, too.",
        examples=[
            "hanlin rl FrozenLake-v1 --method value-iteration --out runs/lake",
            "hanlin rl CliffWalking-v1 --method sarsa --steps 100000 --out runs/cliff",
            "hanlin rl CartPole-v1 --method ppo --seed 1 --out runs/pole",
        ],
    )
    parser.add_argument("env", metavar="ENV", help="gymnasium's id of the environment, such as CartPole-v1")
    methods = (*PLANNING, *TABULAR, *DEEP)
    parser.add_argument("--method", required=True, choices=methods, metavar="METHOD", help=", ".join(methods))
    parser.add_argument("--steps", type=count, metavar="N", help="steps to learn for (default: as the method needs)")
    parser.add_argument("--gamma", type=float, metavar="G", help="discount (default: 0.99; ppo 0.98)")
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="of every draw (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for metrics.jsonl, values.json and the pictures")
    options = parser.parse_args(argv)
    if options.gamma is not None and not 0 <= options.gamma <= 1:
        raise HanlinError(f"--gamma is {options.gamma}; it must lie between 0 and 1.")
    if options.out is not None and (options.out / "metrics.jsonl").exists():
        raise HanlinError(f"{options.out} already holds a run; choose another --out.")
    if options.method in PLANNING and options.steps is not None:
        raise HanlinError(f"--steps is for methods that learn from samples; {options.method} sweeps until it is exact.")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise HanlinError(f"{options.out} is a file; --out names a folder.")
    _run(options)


@dataclass
class Study:
    """A method at work. episodes: learns as it is walked through (empty for planning). act: the greedy policy so far.

    table: (V, greedy actions or None) so far, where the states are numbered. facts: lines of the printed table.
    """

    episodes: Iterator["Episode"]
    act: Callable[[], "Act | None"]
    table: Callable[[], "tuple[Tensor, Tensor | None] | None"] = lambda: None
    facts: Callable[[], dict[str, str]] = field(default=dict)


def _run(options: Any) -> None:
    import torch

    from hanlin.core.metrics import MetricsFile
    from hanlin.rl.episodes import evaluate, make_environment

    torch.set_num_threads(1)  # the networks are tiny: a second thread only waits
    env = make_environment(options.env)
    steps = options.steps or STEPS.get(options.method, 0)
    open_study = _plan if options.method in PLANNING else _tables if options.method in TABULAR else _networks
    study = open_study(options, env, steps)
    rows: list[dict[str, Any]] = []
    recent: deque[float] = deque(maxlen=TEST_EPISODES)
    file = MetricsFile(options.out / "metrics.jsonl") if options.out is not None else None
    started = time.monotonic()
    try:
        with Progress(options.method, total=steps or None, unit="steps", quiet=options.quiet or not steps) as bar:
            for row in _digest(study.episodes, recent, max(1, steps // ROWS), started):
                rows.append(row)
                if file is not None:
                    file.write(row)
                bar.advance(row["step"] - bar.done, **{"return": row["return"]})
    except KeyboardInterrupt:
        say(f"Stopped at step {rows[-1]['step'] if rows else 0}; what was learnt until then:", quiet=options.quiet)
        raise
    finally:
        if file is not None:
            file.close()
            _write(options, env, study, rows)
        learnt = time.monotonic() - started
        act = study.act()
        facts = {"environment": options.env, "method": f"{options.method}, seed {options.seed}"}
        if rows:
            facts["learnt"] = f"{rows[-1]['step']:,} steps, {rows[-1]['episodes']:,} episodes, {learnt:.1f} s"
            facts["return while learning"] = (
                f"{sum(recent) / len(recent):.4g} (mean of the last {len(recent)} episodes)"
            )
        if act is not None:
            scores = torch.tensor(evaluate(make_environment(options.env), act, episodes=TEST_EPISODES, seed=10_000))
            facts["return of the greedy policy"] = (
                f"{scores.mean():.4g} ± {scores.std() / len(scores) ** 0.5:.2g} (mean of {TEST_EPISODES} episodes)"
            )
        facts |= study.facts()
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
        if options.out is not None:
            say(f"Written to {options.out}", quiet=options.quiet)


def _digest(
    episodes: Iterator["Episode"], recent: "deque[float]", every: int, started: float
) -> Iterator[dict[str, Any]]:
    """A row of metrics for about each `every` steps: the means over the episodes that ended in them.

    recent: takes the return of each episode as it ends.
    """
    waiting: list[Episode] = []
    seen, next_row = 0, every

    def row() -> dict[str, Any]:
        means = {name: sum(e.metrics[name] for e in waiting) / len(waiting) for name in waiting[-1].metrics}
        return {
            "step": waiting[-1].step, "time": time.monotonic() - started, "episodes": seen,
            "return": sum(e.score for e in waiting) / len(waiting),
            "length": sum(e.length for e in waiting) / len(waiting),
        } | means  # fmt: skip

    for episode in episodes:
        waiting.append(episode)
        recent.append(episode.score)
        seen += 1
        if episode.step >= next_row:
            yield row()
            waiting.clear()
            next_row = episode.step + every
    if waiting:
        yield row()


def _plan(options: Any, env: Any, steps: int) -> Study:
    from hanlin.rl.mdp import read_mdp
    from hanlin.rl.planning import policy_iteration, value_iteration

    mdp = read_mdp(env, gamma=_gamma(options))
    plan = (value_iteration if options.method == "value-iteration" else policy_iteration)(mdp)
    unit = "sweeps" if options.method == "value-iteration" else "improvements of the policy"
    facts = {
        "planned": f"{mdp.states} states, {mdp.actions} actions, {len(plan.changes)} {unit}",
        "V of the start": f"{mdp.expected(plan.V):.6g} (gamma {mdp.gamma})",
    }
    act = plan.actions.tolist().__getitem__
    return Study(iter(()), lambda: act, lambda: (plan.V, plan.actions), lambda: facts)


def _tables(options: Any, env: Any, steps: int) -> Study:
    import torch

    from hanlin.rl import tabular
    from hanlin.rl.episodes import Linear, count_actions, count_states
    from hanlin.rl.mdp import deterministic, read_mdp, soften
    from hanlin.rl.planning import value_iteration

    states, actions, gamma = count_states(env), count_actions(env), _gamma(options)
    common: dict[str, Any] = {"gamma": gamma, "steps": steps, "seed": options.seed}
    known = hasattr(env.unwrapped, "P")
    if options.method == "td0":  # prediction: of the best policy, softened so that it comes everywhere
        mdp = read_mdp(env, gamma=gamma)
        policy = soften(deterministic(value_iteration(mdp).actions, actions), 0.1)
        V, exact = torch.zeros(states, dtype=torch.float64), mdp.value(policy)
        return Study(
            tabular.predict_td0(env, V, policy, **common),
            lambda: None,
            lambda: (V, None),
            lambda: {
                "predicted": "the optimal policy with 10 % uniform actions",
                "V of the start": f"{mdp.expected(V):.5g}; exact {mdp.expected(exact):.5g} (gamma {gamma})",
            },
        )
    learn = {"monte-carlo": tabular.monte_carlo, "sarsa": tabular.sarsa, "q-learning": tabular.q_learning}
    Q = torch.zeros(states, actions, dtype=torch.float64)
    episodes = learn[options.method](env, Q, epsilon=Linear(1.0, 0.01, int(0.8 * steps)), **common)

    def facts() -> dict[str, str]:
        if not known:
            return {}
        mdp = read_mdp(env, gamma=gamma)
        best = mdp.expected(value_iteration(mdp).V)
        reached = mdp.expected(mdp.value(deterministic(tabular.greedy(Q), actions))) if gamma < 1 else float("nan")
        return {"V of the start": f"{reached:.6g} exactly, of the greedy policy; optimal {best:.6g} (gamma {gamma})"}

    return Study(
        episodes,
        lambda: tabular.greedy(Q).tolist().__getitem__,
        lambda: (Q.amax(-1), tabular.greedy(Q)),
        facts,
    )


def _networks(options: Any, env: Any, steps: int) -> Study:
    from dataclasses import replace

    from hanlin.rl.episodes import make_environment

    change = {} if options.gamma is None else {"gamma": options.gamma}
    if options.method == "dqn":
        from hanlin.rl.dqn import DQN, DQNSettings

        dqn = DQN(env, DQNSettings(**change), seed=options.seed)
        return Study(dqn.learn(env, steps=steps, judge=make_environment(options.env)), lambda: dqn.act)
    from hanlin.rl.policy_gradient import METHODS, PolicyGradient

    settings = replace(METHODS[options.method], **change)
    learner = PolicyGradient(env, settings, seed=options.seed)
    envs = [make_environment(options.env) for _ in range(settings.envs)]
    return Study(learner.learn(envs, steps=steps), lambda: learner.act)


def _write(options: Any, env: Any, study: Study, rows: list[dict[str, Any]]) -> None:
    from hanlin.core.files import write_json
    from hanlin.rl.draw import draw_curve, draw_grid

    title = f"{options.env}, {options.method}, seed {options.seed}"
    if rows:
        solved = getattr(getattr(env, "spec", None), "reward_threshold", None)
        draw_curve(rows, options.out / "curve.png", title=title, reference=solved)
    if (table := study.table()) is not None:
        V, actions = table
        write_json(
            options.out / "values.json", {"V": V.tolist(), "actions": None if actions is None else actions.tolist()}
        )
        draw_grid(env, V, actions, options.out / "values.png", title=title)


def _gamma(options: Any) -> float:
    return 0.99 if options.gamma is None else options.gamma
