"""Where a run's numbers go: `metrics.jsonl` always, and other trackers through the same two methods.

Every tracker writes files into the run folder and contacts no host. `online` lets it: W&B then syncs to the host that
its own login names, MLflow writes to MLFLOW_TRACKING_URI, trackio to the Space in TRACKIO_SPACE_ID.
"""

import json
import numbers
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hanlin.core.errors import HanlinError, require
from hanlin.core.files import write_text
from hanlin.core.metrics import MetricsFile
from hanlin.core.runs import Run


class Tracker(Protocol):
    """Takes the lines of a run as they come. A line has `step` and any other numbers."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard event files in RUN/tensorboard (extra `track`). What an earlier try wrote past `resume_step` is
    hidden by TensorBoard's own purge mark, so that a resumed run shows each step once."""

    def __init__(self, run: Run, resume_step: int | None, online: bool) -> None:
        require("tensorboard", "track")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=(resume_step or 0) + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _values(row).items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """trackio's SQLite file in RUN/trackio (extra `trackio`; look with `TRACKIO_DIR=RUN/trackio trackio show`)."""

    def __init__(self, run: Run, resume_step: int | None, online: bool) -> None:
        os.environ["TRACKIO_DIR"] = str((run.path / "trackio").absolute())  # read when it is imported
        trackio: Any = require("trackio", "trackio")

        space = _where("TRACKIO_SPACE_ID") if online else None
        self._run = trackio.init(
            project="hanlin", name=run.path.name, space_id=space, embed=False, resume="allow", auto_log_gpu=False
        )
        self._done = resume_step or 0

    def write(self, row: Mapping[str, Any]) -> None:
        if row["step"] > self._done:
            self._run.log(_values(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class Wandb:
    """W&B's files in RUN/wandb (extra `wandb`; `wandb sync RUN/wandb/offline-run-...` sends them later). A resumed run
    writes a further folder with the same id, which W&B joins. Its own counter of lines never goes back, so the step is
    a number of the line: after a rollback the steps that are made again stand beside the first ones."""

    def __init__(self, run: Run, resume_step: int | None, online: bool) -> None:
        wandb: Any = require("wandb", "wandb")

        self._run = wandb.init(
            project="hanlin", name=run.path.name, dir=str(run.path), mode="online" if online else "offline",
            id=_kept(run, "wandb", lambda: secrets.token_hex(4)), resume="allow" if online else None,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({**_values(row), "step": row["step"]})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow's files in RUN/mlruns (extra `mlflow`; `mlflow ui --backend-store-uri RUN/mlruns`). A resumed run goes on
    in the same one."""

    def __init__(self, run: Run, resume_step: int | None, online: bool) -> None:
        mlflow: Any = require("mlflow", "mlflow")

        if online:
            store = _where("MLFLOW_TRACKING_URI")
        else:
            store = (run.path / "mlruns").absolute().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it prefers a database
        self._client = mlflow.MlflowClient(tracking_uri=store)
        found = self._client.get_experiment_by_name("hanlin")
        experiment = found.experiment_id if found else self._client.create_experiment("hanlin")
        self._id = _kept(run, "mlflow", lambda: self._client.create_run(experiment, run_name=run.path.name).info.run_id)
        self._client.update_run(self._id, "RUNNING")

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _values(row).items():
            self._client.log_metric(self._id, name, value, step=int(row["step"]))

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[Run, int | None, bool], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


class Trackers:
    """All trackers of a run as one. names: of `TRACKERS`; resume_step: the last step that the checkpoint holds; None
    for a fresh run."""

    def __init__(self, run: Run, names: Sequence[str], *, resume_step: int | None, online: bool = False) -> None:
        others = [TRACKERS[name](run, resume_step, online) for name in names]  # first: they may refuse
        self.file = MetricsFile(run.metrics, resume_step=resume_step)
        self.all: list[Tracker] = [self.file, *others]

    def write(self, row: Mapping[str, Any]) -> None:
        for tracker in self.all:
            tracker.write(row)

    def rewind(self, step: int) -> None:
        """Drop the file's lines past `step`. What other trackers were told stays told."""
        self.file.close()
        self.file = MetricsFile(self.file.path, resume_step=step)
        self.all[0] = self.file

    def sync(self) -> None:
        """Force the file's lines to the disk."""
        self.file.sync()

    def close(self) -> None:
        for tracker in self.all:
            tracker.close()


def _kept(run: Run, tracker: str, make: Callable[[], str]) -> str:
    """The id that the tracker knows this run by, made once and kept in RUN/trackers.json."""
    file = run.path / "trackers.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if tracker not in known:
        known[tracker] = make()
        write_text(file, json.dumps(known, indent=1) + "\n")
    return known[tracker]


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, without those that say where it stands."""
    return {
        name: float(value)
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, numbers.Real)
    }


def _where(variable: str) -> str:
    if not (found := os.environ.get(variable)):
        raise HanlinError(
            f"train.trackers_online is set, but the environment's {variable} does not say where to write."
        )
    return found
