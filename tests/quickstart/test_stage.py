"""Stages: done once, redone when their inputs change, continued when they were killed; and how minutes become steps."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hanlin.quickstart.plan import plan_steps
from hanlin.quickstart.recipe import TimePlan
from hanlin.quickstart.stage import fingerprint, run_stage

KILLED = """
import os, signal, sys
from pathlib import Path
from hanlin.quickstart.stage import run_stage

def work(folder):
    (folder / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

run_stage(Path(sys.argv[1]), "one", {"a": 1}, work, quiet=True)
"""


def test_stage_runs_once_until_its_inputs_change(tmp_path: Path) -> None:
    runs = []

    def work(folder: Path) -> dict[str, int]:
        runs.append(sorted(p.name for p in folder.iterdir()))
        (folder / "out.txt").write_text("text")
        return {"n": len(runs)}

    first = run_stage(tmp_path, "one", {"a": 1, "b": 2}, work, quiet=True)
    again = run_stage(tmp_path, "one", {"b": 2, "a": 1}, work, quiet=True)
    assert (first.fresh, again.fresh) == (True, False)
    assert first.result["n"] == again.result["n"] == 1
    assert again.seconds == first.seconds
    changed = run_stage(tmp_path, "one", {"a": 1, "b": 3}, work, quiet=True)
    assert changed.fresh
    assert changed.fingerprint != first.fingerprint
    assert runs == [["begun.json"], ["begun.json"]]  # the second began in an empty folder


def test_killed_stage_keeps_its_work_for_the_same_inputs_only(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "one" / "done.json").exists()
    found = []

    def work(folder: Path) -> dict[str, int]:
        found.append((folder / "half.txt").exists())
        return {}

    run_stage(tmp_path, "one", {"a": 1}, work, quiet=True)
    subprocess.run([sys.executable, "-c", KILLED.replace('"a": 1', '"a": 2'), str(tmp_path)], check=False)
    run_stage(tmp_path, "one", {"a": 3}, work, quiet=True)
    assert found == [True, False]


def test_failed_stage_is_not_done_and_counts_its_time(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, int]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_stage(tmp_path, "one", {}, fail, quiet=True)
    begun = json.loads((tmp_path / "one" / "begun.json").read_text())
    assert begun["seconds"] > 0
    done = run_stage(tmp_path, "one", {}, lambda folder: {}, quiet=True)
    assert done.fresh
    assert done.seconds > begun["seconds"]


def test_damaged_mark_counts_as_not_done(tmp_path: Path) -> None:
    run_stage(tmp_path, "one", {}, lambda folder: {}, quiet=True)
    (tmp_path / "one" / "done.json").write_text('{"fingerp')
    assert run_stage(tmp_path, "one", {}, lambda folder: {}, quiet=True).fresh


def test_fingerprint_ignores_the_order_of_keys() -> None:
    assert fingerprint({"a": {"x": 1, "y": 2}, "b": 3}) == fingerprint({"b": 3, "a": {"y": 2, "x": 1}})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


@pytest.mark.parametrize("minutes", [0.5, 4, 11, 30, 120])
def test_plan_fills_the_minutes_and_no_more(minutes: float) -> None:
    plan = TimePlan()
    spent = min(40.0, 0.1 * minutes * 60)
    steps = plan_steps(plan, minutes=minutes, spent=spent, seconds_a_step=(0.7, 0.5), steps_an_epoch=(2500, 250))
    training = steps.pretrain * 0.7 + steps.sft * 0.5
    assert spent + training <= minutes * 60 * (1 - plan.evaluation) + plan.evaluation * minutes * 60
    assert training >= 0.5 * minutes * 60 or minutes == 0.5 or steps.pretrain == 8 * 2500
    assert steps.sft <= plan.most_sft_epochs * 250
    assert steps.pretrain <= plan.most_epochs * 2500


def test_more_minutes_give_more_steps() -> None:
    found = [
        plan_steps(TimePlan(), minutes=m, spent=40, seconds_a_step=(0.7, 0.7), steps_an_epoch=(2500, 250))
        for m in (2, 5, 11, 30)
    ]
    assert [s.pretrain for s in found] == sorted({s.pretrain for s in found})
