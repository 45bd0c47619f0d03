"""A recipe is a typed value: one pydantic model a command, YAML on disk, `--key.path value` on the command line.

A wrong key is answered with its nearest neighbour and its place in the file; a value out of range with what was found
and what is allowed. Nothing is ignored: `extra="forbid"` all the way down.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe. Frozen: a recipe is a value, a change makes a new one (`model_copy(update=...)`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Section):
    """The whole recipe of one command. `Recipe.load(path, overrides)` reads, overrides, checks."""
