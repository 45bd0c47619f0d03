"""`NamedRecipe`: a recipe whose output is the folder `runs`/`name`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from hanlin.core.recipe import Recipe


class NamedRecipe(Recipe):
    """What recipes with an output folder have in common."""

    name: Annotated[str, Field(description="the output folder is `runs`/`name`")]
    runs: Annotated[Path, Field(description="folder of run folders")] = Path("runs")
    seed: int = 0

    @property
    def out(self) -> Path:
        """The output folder."""
        return self.runs / self.name

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if not name.strip() or name in (".", "..") or Path(name).name != name:
            raise ValueError(f"{name!r} is no folder name; `runs` says where the folder lies")
        return name
