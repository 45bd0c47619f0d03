"""The next step's rows are read while the model computes.

Batches are pure functions of (step, rows), so reading ahead cannot change their order: whoever asked for rows [a, b) of
step s will most likely ask for the same rows of step s + 1, and a thread prepares those. A wrong guess costs a
preparation that nobody takes.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from hanlin.data.batch import Batch, BatchSource

Rows = tuple[int, int | None]


class Prefetch:
    """A `BatchSource` that gives exactly what `source` gives, one step ahead. Use it from one thread."""

    def __init__(self, source: BatchSource) -> None:
        self.source = source
        self.rows_per_step, self.steps_per_epoch = source.rows_per_step, source.steps_per_epoch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: dict[Rows, tuple[int, Future[Batch]]] = {}

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of a step."""
        rows = (start, stop)
        expected, future = self._ahead.pop(rows, (None, None))
        if future is None or expected != step:
            if future is not None:
                future.cancel()
            future = self._pool.submit(self.source.batch, step, start, stop)
        found = future.result()
        self._ahead[rows] = (step + 1, self._pool.submit(self.source.batch, step + 1, start, stop))
        return found

    def fingerprint(self) -> dict[str, Any]:
        """The source's own."""
        return self.source.fingerprint()

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(cancel_futures=True)
