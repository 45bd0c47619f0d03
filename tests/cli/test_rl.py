"""`hanlin rl`: each method prints its table, writes its files, and a mistake is one clear paragraph."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from hanlin.cli import main
from hanlin.core.metrics import read_metrics

pytest.importorskip("gymnasium")


def colours(path) -> int:
    with Image.open(path) as image:
        assert min(image.size) > 300
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


def facts(text: str) -> dict[str, str]:
    return dict((part.strip() for part in line.split("  ", 1)) for line in text.splitlines())


@pytest.mark.parametrize("method", ["value-iteration", "policy-iteration"])
def test_planning_prints_the_value_and_draws_the_lake(method, tmp_path, capsys):
    out = tmp_path / "lake"
    assert main(["rl", "FrozenLake-v1", "--method", method, "--out", str(out), "--quiet"]) == 0
    said = facts(capsys.readouterr().out)
    assert said["V of the start"] == "0.542026 (gamma 0.99)"
    score = float(said["return of the greedy policy"].split()[0])
    assert 0.55 < score < 0.95  # within 100 steps it arrives in 74 %
    assert colours(out / "values.png") > 50
    values = json.loads((out / "values.json").read_text())
    assert len(values["V"]) == len(values["actions"]) == 16 and values["V"][15] == 0
    assert not (out / "curve.png").exists()


@pytest.mark.parametrize("method", ["monte-carlo", "td0", "sarsa", "q-learning"])
def test_tabular_methods_write_metrics_curve_and_values(method, tmp_path, capsys):
    out = tmp_path / "cliff"
    argv = ["rl", "CliffWalking-v1", "--method", method, "--steps", "6000", "--out", str(out)]
    assert main(argv) == 0
    caught = capsys.readouterr()
    said = facts(caught.out)
    assert "V of the start" in said and "-12.2479" in (said["V of the start"] + "-12.2479" * (method == "td0"))
    rows = read_metrics(out / "metrics.jsonl")
    assert 5 < len(rows) <= 201
    assert rows[-1]["step"] <= 6000 and [r["step"] for r in rows] == sorted({r["step"] for r in rows})
    assert rows[-1].keys() >= {"step", "time", "episodes", "return", "length"}
    assert colours(out / "curve.png") > 10 and colours(out / "values.png") > 50
    assert str(out) in caught.err
    assert main(argv) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["dqn", "reinforce", "actor-critic", "ppo"])
def test_deep_methods_run_on_vectors_and_on_numbers(method, tmp_path, capsys):
    out = tmp_path / "pole"
    assert main(["rl", "CartPole-v1", "--method", method, "--steps", "600", "--out", str(out), "--quiet"]) == 0
    assert float(facts(capsys.readouterr().out)["return of the greedy policy"].split()[0]) >= 8
    assert read_metrics(out / "metrics.jsonl") and colours(out / "curve.png") > 10
    assert not (out / "values.png").exists()
    assert main(["rl", "FrozenLake-v1", "--method", method, "--steps", "300", "--quiet"]) == 0


def test_the_same_seed_gives_the_same_run(capsys):
    found = []
    for seed in ("1", "1", "2"):
        assert (
            main(["rl", "FrozenLake-v1", "--method", "q-learning", "--steps", "3000", "--seed", seed, "--quiet"]) == 0
        )
        said = facts(capsys.readouterr().out)
        found.append((said["return while learning"], said["V of the start"], said["learnt"].rpartition(",")[0]))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["CartPoll-v1", "--method", "ppo"], "There is no environment 'CartPoll-v1' here"),
        (["Pendulum-v1", "--method", "ppo"], "every method here chooses among finitely many actions"),
        (["Pendulum-v1", "--method", "dqn"], "every method here chooses among finitely many actions"),
        (["CartPole-v1", "--method", "sarsa"], "a tabular method has one entry a state"),
        (["CartPole-v1", "--method", "td0"], "a tabular method has one entry a state"),
        (["CartPole-v1", "--method", "value-iteration"], "CartPole-v1 publishes no transition table"),
        (["Blackjack-v1", "--method", "ppo"], "a network here takes numbers or arrays"),
        (["FrozenLake-v1", "--method", "q-learn"], "invalid choice: 'q-learn'"),
        (["FrozenLake-v1", "--method", "policy-iteration", "--steps", "5"], "sweeps until it is exact"),
        (["FrozenLake-v1", "--method", "sarsa", "--gamma", "1.5"], "it must lie between 0 and 1"),
        (["FrozenLake-v1", "--method", "sarsa", "--steps", "0"], "no whole number of 1 or more"),
        (["FrozenLake-v1"], "--method"),
    ],
)
def test_mistakes_are_explained(argv, said, capsys, tmp_path):
    assert main(["rl", *argv, "--out", str(tmp_path / "run")]) == 2
    caught = capsys.readouterr()
    assert said in caught.err and caught.out == ""
    assert not (tmp_path / "run").exists()


def test_ctrl_c_keeps_and_draws_what_was_learnt(tmp_path):
    out = tmp_path / "run"
    argv = ["rl", "FrozenLake-v1", "--method", "q-learning", "--steps", "50000000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from hanlin.core import metrics\nimport sys\nimport hanlin.cli.rl as rl\n"
         "rl.ROWS = 50000\nfrom hanlin.cli import main\nsys.exit(main(sys.argv[1:]))", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(read_metrics(out / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopped at step" in told and "Traceback" not in told
    assert "return of the greedy policy" in said
    assert len(read_metrics(out / "metrics.jsonl")) >= 3
    assert colours(out / "curve.png") > 10 and (out / "values.png").exists()
