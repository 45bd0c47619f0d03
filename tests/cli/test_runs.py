"""`hanlin runs`: tables and plots of run folders."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from hanlin.cli import main
from hanlin.core.metrics import MetricsFile
from hanlin.core.runs import Run


def make_run(folder, *, lr: float, losses: list[float], finished: bool = False) -> None:
    run = Run.open(folder)
    recipe = {"name": folder.name, "objective": {"kind": "causal_lm"}, "train": {"lr": lr, "steps": 30}}
    run.recipe.write_text(yaml.safe_dump(recipe))
    file = MetricsFile(run.metrics)
    for step, loss in enumerate(losses, start=1):
        file.write({"step": 10 * step, "time": 61.0 * step, "tokens": 5000 * step, "loss": loss, "tokens_per_s": 80.5})
        file.write({"step": 10 * step, "time": 61.5 * step, "tokens": 5000 * step, "eval/loss": loss + 0.5})
    file.close()
    if finished:
        run.model.mkdir()


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "first", lr=1e-3, losses=[3.0, 2.0, 2.25], finished=True)
    make_run(tmp_path / "second", lr=2e-3, losses=[3.0, float("nan")])
    return tmp_path


def test_list_has_a_line_a_run_with_its_last_finite_values(runs, capsys):
    assert main(["runs", "list", "--root", str(runs)]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert str(runs / "first") in first and "30/30" in first and "2.25" in first and "3:04" in first
    assert "finished" in first and "finished" not in second
    assert "20/30" in second and " 3 " in second  # the NaN is no value
    assert main(["runs", "list", "--root", str(runs), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["first"]["best eval/loss"] == 2.5 and rows["second"]["loss"] == 3.0


def test_compare_shows_what_differs_and_draws_the_curves(runs, capsys):
    png = runs / "both.png"
    folders = [str(runs / "first"), str(runs / "second")]
    assert main(["runs", "compare", *folders, "--png", str(png), "--by", "tokens"]) == 0
    out = capsys.readouterr().out
    assert "train.lr" in out and "0.001" in out and "0.002" in out and "train.steps" not in out
    with Image.open(png) as image:
        assert image.width > 500 and len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    assert main(["runs", "compare", *folders, "--json", "--keys", "loss"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["curves"]["loss"][folders[0]] == [[10, 3.0], [20, 2.0], [30, 2.25]]
    assert found["differences"] == {"train.lr": [1e-3, 2e-3]}


def test_show_tells_of_one_run(runs, capsys):
    assert main(["runs", "show", str(runs / "first")]) == 0
    out = capsys.readouterr().out
    assert "eval/loss" in out and "2.75" in out and "best eval/loss" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "nowhere"], "does not exist"),
        (["list", "--root", "nowhere"], "There is no folder nowhere"),
        (["compare", "first", "second", "--keys", "lss"], "No run has a curve 'lss'; there are: loss"),
    ],
)
def test_mistakes_are_answered_with_what_there_is(runs, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(runs)
    assert main(["runs", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_torn_line_and_a_damaged_recipe_hide_no_run(runs, capsys):
    with (runs / "first" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    (runs / "second" / "recipe.yaml").write_text("train: [")
    assert main(["runs", "list", "--root", str(runs)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
