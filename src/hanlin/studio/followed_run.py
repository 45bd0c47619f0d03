"""A run folder that is read again and again while it is written."""

import time
from pathlib import Path
from typing import Any

from hanlin.align.health import Alarm, Health, read_samples
from hanlin.align.health_report import SAMPLES
from hanlin.train.history import RunHistory, read_run

QUIET = 120.0  # seconds without a new line after which a run that is not finished is called quiet


class FollowedRun:
    """history, alarms, samples: as of the last `read`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: list[dict[str, Any]] = []
        self._health, self._fed = Health(), 0
        self._sizes: tuple[tuple[int, float], ...] = ()
        self.history: RunHistory = read_run(path)
        self._digest()

    @property
    def alarms(self) -> list[Alarm]:
        return self._health.alarms

    @property
    def state(self) -> str:
        """`finished`, `running`, or `quiet`: nothing was written for two minutes."""
        if self.history.finished:
            return "finished"
        return "running" if time.time() - self.history.changed < QUIET else "quiet"

    def read(self) -> bool:
        """Look at the files again; True if there is something new."""
        if _sizes(self.path) == self._sizes:
            return False
        self.history = read_run(self.path)
        self._digest()
        return True

    def _digest(self) -> None:
        """Only new lines go through the rules, unless earlier ones are no longer what they were (the run went back)."""
        self._sizes = _sizes(self.path)
        rows = self.history.rows
        if self._fed and (self._fed > len(rows) or rows[self._fed - 1] != self._last):
            self._health, self._fed = Health(), 0
        for row in rows[self._fed :]:
            self._health.see(row)
        self._fed = len(rows)
        self._last = rows[-1] if rows else None
        self.samples = read_samples(self.path / SAMPLES)


def run_folders(root: Path) -> dict[str, Path]:
    """Name to folder of every run below `root` (itself included), the newest first."""
    found = [(file.stat().st_mtime, file.parent) for file in root.rglob("metrics.jsonl")]
    ordered = [folder for _, folder in sorted(found, reverse=True)]
    return {folder.name if folder == root else folder.relative_to(root).as_posix(): folder for folder in ordered}


def _sizes(path: Path) -> tuple[tuple[int, float], ...]:
    files = (path / "metrics.jsonl", path / SAMPLES, path / "model")
    return tuple((s.st_size, s.st_mtime) for file in files if file.exists() for s in (file.stat(),))
