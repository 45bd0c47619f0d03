"""A recipe is a typed value: one pydantic model a command, YAML on disk, `--key.path value` on the command line.

    file (YAML)  →  plain tree  →  flags laid over it  →  what is left out: the defaults  →  checked once, as a whole

What the file and the flags leave out keeps the recipe's default at any depth: `train: {lr: 1e-3}` changes the rate and
nothing else. A wrong key is answered with its nearest neighbour and its place in the file; a value out of range with
what was found and what is allowed. Nothing is ignored: `extra="forbid"` all the way down, no key and no flag twice.

Relative paths in a recipe are relative to the working directory.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from hanlin.core.errors import HanlinError


class Section(BaseModel):
    """A part of a recipe. Frozen: a recipe is a value, a change makes a new one (`model_copy(update=...)`).

    Where a section has several variants (`optimizer: AdamW | Muon`), each carries its name in the field `kind`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Section):
    """The whole recipe of one command. `Recipe.load(path, argv)` reads, overrides, checks."""

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None, argv: Sequence[str] = (), *, usage: str = "hanlin") -> Self:
        """The recipe in the YAML file (None: the defaults alone), with the overrides `--key.path value` of argv.

        `--help` in argv prints every field and leaves with `SystemExit(0)`; usage is the command it names
        ("hanlin train RECIPE"). An unknown key or flag, a value that does not fit, a field that is missing, or YAML
        that does not parse is a `HanlinError` that names the place.
        """
        from hanlin.core.recipe_errors import explain
        from hanlin.core.recipe_fields import fill_defaults
        from hanlin.core.recipe_flags import apply_flags
        from hanlin.core.recipe_yaml import Source, read_recipe

        source = Source() if path is None else read_recipe(Path(path))
        tree = fill_defaults(cls, source.tree)
        tree, flags = apply_flags(cls, tree, argv, usage)
        try:
            return cls.model_validate(fill_defaults(cls, tree))
        except ValidationError as error:
            raise HanlinError(explain(error, cls, tree, source, flags)) from None

    def to_yaml(self) -> str:
        """The recipe as resolved, as YAML that `load` reads back to an equal value."""
        from hanlin.core.recipe_yaml import write_recipe

        return write_recipe(self.model_dump(mode="json"))
