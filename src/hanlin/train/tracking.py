"""Where a run's numbers go: `metrics.jsonl` always, and other trackers through the same two methods."""

import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hanlin.core.errors import require
from hanlin.core.metrics import MetricsFile
from hanlin.core.runs import Run


class Tracker(Protocol):
    """Takes the lines of a run as they come. A line has `step` and any other numbers."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard event files in `folder` (extra `track`). first_step: what an earlier try wrote from there on is
    hidden by TensorBoard's own purge mark, so that a resumed run shows each step once."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        require("tensorboard", "track")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, numbers.Real):
                self._writer.add_scalar(name if "/" in name else f"train/{name}", float(value), row["step"])

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """All trackers of a run as one. resume_step: the last step that the checkpoint holds; None for a fresh run."""

    def __init__(self, run: Run, *, tensorboard: bool, resume_step: int | None) -> None:
        self.file = MetricsFile(run.metrics, resume_step=resume_step)
        self.all: list[Tracker] = [self.file]
        if tensorboard:
            self.all.append(TensorBoard(run.path / "tensorboard", first_step=(resume_step or 0) + 1))

    def write(self, row: Mapping[str, Any]) -> None:
        for tracker in self.all:
            tracker.write(row)

    def sync(self) -> None:
        """Force the file's lines to the disk."""
        self.file.sync()

    def close(self) -> None:
        for tracker in self.all:
            tracker.close()
