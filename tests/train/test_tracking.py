"""Trackers get the numbers that `metrics.jsonl` gets, in files of the run folder, and contact no host."""

import json
import os
import subprocess
import sys

import pytest

from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run
from hanlin.train.tracking import TRACKERS, Trackers

ROWS = [{"step": step, "time": 0.5 * step, "loss": 3.0 / step, "eval/loss": 4.0 / step, "note": "x"} for step in (1, 2)]
WRITE = """
import json, socket, sys
from hanlin.core.runs import Run
from hanlin.train.tracking import Trackers
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"contacts {address}")
    return real(self, address)
socket.socket.connect = connect
for resumed, rows in enumerate(json.loads(sys.argv[3])):
    trackers = Trackers(Run.open(sys.argv[1]), [sys.argv[2]], resume_step=len(rows) * resumed or None)
    for row in rows:
        trackers.write(row)
    trackers.close()
"""


@pytest.fixture(params=["trackio", "wandb", "mlflow"])
def written(request, tmp_path):
    """A run folder written in a process of its own, in two goes: these packages keep state and read the environment
    once."""
    pytest.importorskip(request.param)
    command = [sys.executable, "-c", WRITE, str(tmp_path / "trial"), request.param, json.dumps([ROWS[:1], ROWS[1:]])]
    home = {"HOME": str(tmp_path), "WANDB_MODE": "online", "MLFLOW_TRACKING_URI": "http://192.0.2.1", "NO_COLOR": "1"}
    done = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param, Run(tmp_path / "trial")


def test_a_tracker_holds_every_number_and_stays_here(written):
    name, run = written
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2]
    if name == "mlflow":
        from mlflow import MlflowClient

        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        client = MlflowClient(tracking_uri=(run.path / "mlruns").absolute().as_uri())
        (found,) = client.search_runs([client.get_experiment_by_name("hanlin").experiment_id])
        history = client.get_metric_history(found.info.run_id, "loss")
        assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 1.5)]
        assert found.data.metrics == {"loss": 1.5, "eval/loss": 2.0} and found.info.run_name == "trial"
    elif name == "trackio":
        import sqlite3

        with sqlite3.connect(run.path / "trackio" / "hanlin.db") as database:
            rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by step")]
        assert [(row["loss"], row["eval/loss"]) for row in rows] == [(3.0, 4.0), (1.5, 2.0)]
    else:
        files = sorted((run.path / "wandb").glob("offline-run-*/*.wandb"))
        assert len({file.name for file in files}) == 1, "both goes have one id"
        assert all(b"eval/loss" in file.read_bytes() for file in files)


def test_online_without_an_address_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(HanlinError, match="MLFLOW_TRACKING_URI"):
        Trackers(Run.open(tmp_path), ["mlflow"], resume_step=None, online=True)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HanlinError, match="belongs to the extra"):
        Trackers(Run.open(tmp_path), [name], resume_step=None)
