"""The report: what a recipe says is planned, and the layout that is shown first fits by the run, too."""

from pathlib import Path

import pytest
import yaml

from hanlin.core.errors import HanlinError
from hanlin.parallel.settings import Layout
from hanlin.plan import report
from hanlin.plan.devices import parse_gpus
from hanlin.plan.exact import Counted
from hanlin.plan.ledger import CATEGORIES
from hanlin.plan.memory import Memory
from hanlin.plan.report import merged_layout, training_plan
from hanlin.plan.request import read_request

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
    def write(**train):
        values = yaml.safe_load((ROOT / "recipes" / "pretrain-tiny.yaml").read_text())
        values.pop("extends", None)
        values["train"] = values.get("train", {}) | train
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def test_a_recipes_rows_and_recompute_are_planned(recipe):
    path = recipe(micro_batch_size=1, recompute={"kind": "full"}, average={}, offload={})
    request = read_request(path, vocab_size=4096)
    assert request.fixed_rows and request.recompute == "full" and request.job.average == 4
    assert any("train.offload is not modelled" in note for note in request.notes)
    first = training_plan(request, parse_gpus("1xH100"))["layouts"][0]
    assert (first["micro_batch"], first["recompute"]) == (1, "full")


def test_what_a_recipe_leaves_out_is_searched(recipe):
    path = recipe()
    values = yaml.safe_load(Path(path).read_text())
    for name in ("micro_batch_size", "recompute"):
        values["train"].pop(name, None)
    Path(path).write_text(yaml.safe_dump(values))
    request = read_request(path, vocab_size=4096)
    assert not request.fixed_rows and request.recompute is None


def test_flags_are_laid_over_the_recipes_layout():
    asked = Layout(tensor=2, shard="zero1")
    assert merged_layout(asked, {"shard": "zero3"}) == Layout(tensor=2, shard="zero3")
    assert merged_layout(asked, None) == merged_layout(asked, {}) == asked
    assert merged_layout(asked, Layout(data=4)) == Layout(data=4)
    assert merged_layout(None, None) is None
    with pytest.raises(HanlinError, match="This layout is not one: expert 3 does not divide data 4"):
        merged_layout(asked, {"data": 4, "expert": 3})


def test_what_does_not_run_is_passed_over_and_named(monkeypatch):
    """The first count is made too large; the next layout is shown, and the table of failures says why."""
    peaks = []

    def count(job, layout, optimizer, *, cuda, rates=None):
        peaks.append(10**12 if not peaks else 10**9)
        return Counted(Memory(dict.fromkeys(CATEGORIES, 0) | {"weights": peaks[-1]}, "loss", "layers"), None, {})

    monkeypatch.setattr(report, "count_exactly", count)
    plan = training_plan(read_request("llama-3-8b", overrides={"batch": 128}), parse_gpus("8xH100"))
    assert peaks == [10**12, 10**9] and plan["layouts"][0]["fits_run"]
    why = [text for text in plan["searched"]["failed"] if "when run" in text]
    assert len(why) == 1 and "931.3 GiB" in why[0] and plan["layouts"][0]["name"] not in why[0]
