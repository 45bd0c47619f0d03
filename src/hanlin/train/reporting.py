"""What a person and a file see of a run while it goes: a bar with loss, speed and time left, and `metrics.jsonl`."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from hanlin.core.progress import Progress
from hanlin.core.runs import Run
from hanlin.train.tracking import Trackers


class Reporter:
    """Bar and trackers of one `fit`, as a context manager.

    run: None writes no file. resumed: the step that the checkpoint holds; None for a fresh run. spent: seconds of
    earlier tries.
    """

    def __init__(
        self,
        title: str,
        *,
        steps: int,
        resumed: int | None,
        spent: float,
        run: Run | None,
        trackers: Sequence[str],
        online: bool,
        quiet: bool,
    ) -> None:
        self._bar = Progress(title, total=steps, unit="steps", done=resumed or 0, quiet=quiet)
        self._trackers = Trackers(run, trackers, resume_step=resumed, online=online) if run else None
        self._began = time.perf_counter() - spent

    def __enter__(self) -> "Reporter":
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        if self._trackers is not None:
            self._trackers.close()

    @property
    def elapsed(self) -> float:
        """Seconds of the run so far, over all tries, evaluation and checkpoints included."""
        return time.perf_counter() - self._began

    def write(self, row: Mapping[str, Any]) -> None:
        """One line to every tracker."""
        if self._trackers is not None:
            self._trackers.write(row)

    def show(self, steps: int = 0, **values: Any) -> None:
        """Move the bar by `steps` and show `values` beside it."""
        self._bar.advance(steps, **values)

    def rewind(self, step: int) -> None:
        """The run went back to this step: lines past it did not happen."""
        self._bar.advance(step - self._bar.done)
        if self._trackers is not None:
            self._trackers.rewind(step)

    def sync(self) -> None:
        """The lines so far are on the disk; call before a checkpoint counts as written."""
        if self._trackers is not None:
            self._trackers.sync()
