"""A recipe is a typed value: one pydantic model a command, YAML on disk, `--key.path value` on the command line.

A wrong key is answered with its nearest neighbour and its place in the file; a value out of range with what was found
and what is allowed. Nothing is ignored: `extra="forbid"` all the way down.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from hanlin.core.errors import HanlinError


class Section(BaseModel):
    """A part of a recipe. Frozen: a recipe is a value, a change makes a new one (`model_copy(update=...)`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Section):
    """The whole recipe of one command. `Recipe.load(path, argv)` reads, overrides, checks."""

    @classmethod
    def load(cls, path: Path | None, argv: Sequence[str] = ()) -> Self:
        """The recipe in the YAML file (None: the defaults), with the overrides `--key.path value` of argv.

        An unknown key or flag, a value that does not fit, or YAML that does not parse is a `HanlinError`.
        """
        import tyro
        import yaml

        try:
            raw = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            default = cls.model_validate(raw)
        except (OSError, ValidationError, yaml.YAMLError) as error:
            raise HanlinError(f"{path}: {error}") from error
        return tyro.cli(cls, default=default, args=list(argv), config=(tyro.conf.AvoidSubcommands,))

    def to_yaml(self) -> str:
        """The recipe as resolved, as YAML that `load` reads back to an equal value."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
