"""Scaling laws: planted constants come back, compute-optimal sizes follow from them, run folders are read."""

import json
import shutil

import numpy as np
import pytest

from hanlin.cli import main
from hanlin.core.errors import HanlinError
from hanlin.core.files import write_json
from hanlin.models.folder import save_config
from hanlin.plan.known import known_config
from hanlin.plan.scaling import CHINCHILLA, REPLICATION, Point, ScalingLaw, exponent, fit_law, isoflop, rule_of_twenty
from hanlin.plan.scaling_runs import read_points

LAWS = [CHINCHILLA, REPLICATION, ScalingLaw(2.1, 30.0, 60.0, 0.25, 0.3), ScalingLaw(0.8, 1e4, 50.0, 0.6, 0.2)]


def planted(law: ScalingLaw, *, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Seven sizes by seven numbers of tokens; noise: standard deviation of log loss."""
    random = np.random.default_rng(seed)
    return [
        Point(f"{n:.0e}-{d:.0e}", n, d, law.loss(n, d) * float(np.exp(noise * random.standard_normal())))
        for n in np.geomspace(4e7, 1e10, 7).tolist()
        for d in np.geomspace(1e9, 3e11, 7).tolist()
    ]


@pytest.mark.parametrize("law", LAWS)
def test_fit_recovers_planted_constants(law):
    assert fit_law(planted(law)).law.values == pytest.approx(law.values, rel=1e-6)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """0.2 % noise, ten draws of it, five constants: 90 % intervals hold the truth in 75 % to all of the 50 cases, and
    the exponents are within 0.05."""
    held = []
    for seed in range(10):
        fit = fit_law(planted(CHINCHILLA, noise=0.002, seed=seed), bootstrap=150, level=0.9)
        for name, truth in zip(("E", "A", "B", "alpha", "beta"), CHINCHILLA.values, strict=True):
            low, high = fit.intervals[name]
            held.append(low < truth < high)
        assert fit.law.alpha == pytest.approx(0.34, abs=0.05)
        assert fit.law.beta == pytest.approx(0.28, abs=0.05)
    assert np.mean(held) >= 0.75


def test_an_outlier_moves_a_huber_fit_little():
    points = planted(CHINCHILLA)
    points[10] = Point("diverged", points[10].parameters, points[10].tokens, 2 * points[10].loss)
    assert fit_law(points).law.values == pytest.approx(CHINCHILLA.values, rel=0.02)


@pytest.mark.parametrize("law", LAWS)
def test_optimum_is_the_lowest_loss_of_the_budget(law):
    """No other size of the same C = 6 N D does better (sizes from a hundredth to a hundred times)."""
    for flops in (1e19, 1e22):
        n, d = law.optimum(flops)
        assert 6 * n * d == pytest.approx(flops)
        others = [law.loss(n * r, d / r) for r in np.geomspace(0.01, 100, 401).tolist()]
        assert law.loss(n, d) <= min(others) + 1e-12


def test_chinchilla_itself_is_near_its_rule():
    """5.76e23 FLOPs, Gopher's budget: the paper trained 70B on 1.4T; D = 20 N gives 69B."""
    parameters, tokens = rule_of_twenty(5.76e23)
    assert parameters == pytest.approx(70e9, rel=0.02)
    assert tokens == pytest.approx(1.4e12, rel=0.02)


def test_isoflop_finds_the_optimum_of_each_budget():
    """Parabolas in log N over half to twice the best size: within 5 %, and the exponent beta / (alpha + beta)."""
    points = []
    for flops in (1e19, 1e20, 1e21):
        best, _ = CHINCHILLA.optimum(flops)
        for n in np.geomspace(best / 2, best * 2, 7).tolist():
            points.append(Point("", n, flops / (6 * n), CHINCHILLA.loss(n, flops / (6 * n))))
    budgets = isoflop(points)
    assert [b.runs for b in budgets] == [7, 7, 7] and all(b.inside for b in budgets)
    for budget in budgets:
        assert budget.parameters == pytest.approx(CHINCHILLA.optimum(budget.flops)[0], rel=0.05)
    assert exponent(budgets) == pytest.approx(0.28 / 0.62, abs=0.005)


def test_runs_that_cannot_tell_constants_apart_are_refused():
    with pytest.raises(HanlinError, match="three sizes and three numbers of tokens"):
        fit_law([p for p in planted(CHINCHILLA) if p.parameters == pytest.approx(4e7)])
    with pytest.raises(HanlinError, match="must be positive"):
        fit_law([*planted(CHINCHILLA), Point("bad", 1e8, 1e9, -1.0)])


@pytest.fixture
def runs(tmp_path):
    """Nine finished runs of a planted law, as the trainer leaves them."""
    base = known_config("qwen3-0.6b")
    folders = []
    for depth in (2, 4, 8):
        config = type(base).uniform(
            "llama", depth=depth, attention=known_config("llama-3-8b").layers[0].attention,
            feed_forward=known_config("llama-3-8b").layers[0].feed_forward, vocab_size=1000, width=256,
        )  # fmt: skip
        for tokens in (10**9, 4 * 10**9, 16 * 10**9):
            folder = tmp_path / f"d{depth}-{tokens}"
            save_config(config, folder / "model")
            write_json(folder / "model" / "config.json", json.loads((folder / "model" / "config.json").read_text()))
            loss = CHINCHILLA.loss(config.parameters().total, tokens)
            lines = [{"step": 1, "tokens": tokens // 2, "loss": 9.0}, {"step": 2, "tokens": tokens, "loss": loss}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            folders.append(folder)
    return folders


def test_run_folders_become_points(runs):
    points, kind = read_points(runs)
    assert kind == "loss" and len(points) == 9
    assert fit_law(points).law.values == pytest.approx(CHINCHILLA.values, rel=1e-4)


def test_scaling_fit_prints_and_draws(runs, tmp_path, capsys):
    out = tmp_path / "law.png"
    assert main(["scaling", "fit", *map(str, runs), "--bootstrap", "20", "--png", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "L = 1.6900" in shown and "Best size for a budget" in shown
    assert out.read_bytes().startswith(b"\x89PNG")
    assert main(["scaling", "fit", *map(str, runs), "--json", "--bootstrap", "0", "--flops", "1e21"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["law"]["alpha"] == pytest.approx(0.34, rel=1e-4)
    assert facts["optimum"][0]["flops"] == 1e21


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["scaling", "fit", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_no_point(runs, capsys):
    shutil.rmtree(runs[0] / "model")
    (runs[0] / "recipe.yaml").write_text("train: {steps: 3}")
    with pytest.raises(HanlinError, match=f"{runs[0].name} is not finished: step 2 of 3"):
        read_points(runs)
    (runs[0] / "recipe.yaml").write_text("train: {epochs: 1}")
    with pytest.raises(HanlinError, match="whether it is finished is unknown"):
        read_points(runs)


@pytest.mark.parametrize("flags", [["--flops", "inf"], ["--flops", "0"], ["--bootstrap", "-1"], ["--png", "x.txt"]])
def test_what_cannot_be_is_refused(flags, capsys):
    assert main(["scaling", "fit", "nowhere", *flags]) == 2
    assert flags[1] in capsys.readouterr().err
