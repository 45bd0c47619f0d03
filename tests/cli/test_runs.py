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
    assert "objective.kind  causal_lm" in out and "train.lr        0.001" in out
    assert "step 30 of 30, finished" in out and "█▁▃" in out  # 3.0, 2.0, 2.25


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


@pytest.mark.parametrize("text", ["train: [", "- a\n- list\n", "train: 5\nobjective: words\n", "\udcff"])
def test_a_recipe_that_is_none_is_named_and_counts_as_empty(runs, capsys, text):
    recipe = runs / "second" / "recipe.yaml"
    recipe.write_bytes(text.encode(errors="surrogateescape"))
    for argv in (["list", "--root", str(runs)], ["show", str(runs / "second")]):
        assert main(["runs", *argv]) == 0
        said = capsys.readouterr()
        assert "second" in said.out and ("recipe.yaml" in said.err or text.startswith("train: 5"))


def test_a_run_without_a_line_has_nothing_to_draw(runs, capsys):
    (runs / "second" / "metrics.jsonl").write_text("")
    assert main(["runs", "show", str(runs / "second")]) == 0
    assert main(["runs", "show", str(runs / "second"), "--png", str(runs / "a.png")]) == 2
    assert "There is no curve to draw" in capsys.readouterr().err


def test_a_plot_has_the_name_and_the_format_that_were_asked_for(runs, capsys):
    for name in ("deep/er/curves.svg", "curves.PNG", "curves.pdf"):
        assert main(["runs", "show", str(runs / "first"), "--png", str(runs / name)]) == 0
        assert f"The curves are in {runs / name}." in capsys.readouterr().out
        assert (runs / name).stat().st_size > 1000
    for name in ("curves", "curves.txt"):
        assert main(["runs", "show", str(runs / "first"), "--png", str(runs / name)]) == 2
        assert "it must end in .png, .svg, .pdf" in capsys.readouterr().err
