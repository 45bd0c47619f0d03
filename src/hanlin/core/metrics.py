"""`metrics.jsonl`: one object a line, append-only, readable while it grows and after `kill -9`.

Every line of a training run has `step, time, tokens, loss, lr, grad_norm, tokens_per_s, mfu` and whatever the
objective adds; evaluation lines carry `step, time, tokens` and `eval/...` names. The studio, `hanlin runs` and the
report read it with `read_metrics`.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hanlin.core.files import write_text

TRAIN_KEYS = ("step", "time", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu")


class MetricsFile:
    """Append-only writer. Opening it at `resume_step` drops a torn last line and every line past that step,
    so that a resumed run has each step once.

    path: the file. resume_step: the last step that the checkpoint holds; None starts an empty file.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        kept = [] if resume_step is None else [r for r in read_metrics(self.path) if r.get("step", 0) <= resume_step]
        write_text(self.path, "".join(_line(row) for row in kept))
        self._stream = self.path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line and flush it. A non-finite number is written as null (JSON has no NaN)."""
        self._stream.write(_line(row))
        self._stream.flush()

    def sync(self) -> None:
        """Force the lines to the disk; the trainer calls it before a checkpoint counts as written."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self.sync()
        self._stream.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a torn last line is left out; a missing file is an empty list."""
    file = Path(path)
    if not file.exists():
        return []
    rows = []
    for line in file.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"
