"""A run is a folder.

runs/NAME/
    recipe.yaml          as resolved: defaults, file and command line together
    metrics.jsonl        one object a line (`hanlin.core.metrics`)
    checkpoints/step-N/  whole or absent, never torn
    report.md, *.png
"""

import os
from dataclasses import dataclass
from pathlib import Path

from hanlin.core.errors import HanlinError
from hanlin.core.files import sweep_partial


@dataclass(frozen=True)
class Run:
    """The paths of one run folder; `Run.open` makes it and removes what a killed process left unfinished."""

    path: Path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Run":
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise HanlinError(f"{folder} is a file; a run needs a folder. Choose another name.")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        sweep_partial(folder)
        sweep_partial(folder / "checkpoints")
        return cls(folder)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """The finished model in the Hugging Face layout."""
        return self.path / "model"

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint, oldest first."""
        found = []
        for folder in (self.path / "checkpoints").glob("step-*"):
            number = folder.name.removeprefix("step-")
            if number.isdigit():
                found.append((int(number), folder))
        return sorted(found)
