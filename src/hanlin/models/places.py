"""Where models lie on this machine, and how a name finds one.

    ~/.cache/hanlin/models/NAME        what `hanlin pull` has brought ($XDG_CACHE_HOME instead of ~/.cache)
    ~/.cache/hanlin/downloads/…        what is still on its way

A path means itself; a name without a folder of that name means the pulled model.
"""

import os
import re
from pathlib import Path

from hanlin.core.errors import HanlinError

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # `smollm2`, `Qwen/Qwen3-0.6B`


def find_model(name: str | os.PathLike[str]) -> Path:
    """The folder that a command's DIR means: itself where it exists, else the pulled model of that name.

    A bare word that is neither is a `HanlinError` that lists what was pulled; any other path is returned as it is, and
    its reader says what is wrong with it.
    """
    path = Path(name)
    if path.exists() or not isinstance(name, str) or NAME.fullmatch(name) is None:
        return path
    pulled = models_folder() / name
    if (pulled / "config.json").exists():
        return pulled
    if "/" in name:
        return path
    there = ", ".join(pulled_models()) or "none yet"
    raise HanlinError(
        f"{name} does not exist: there is no such folder here, and no pulled model is called so (pulled: {there}). "
        "Give a model folder, or `hanlin pull smollm2` first; `hanlin pull --list` shows what there is."
    )


def pulled_models() -> dict[str, Path]:
    """Name -> folder of every pulled model, in order."""
    folder = models_folder()
    found = [*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]
    names = {file.parent.relative_to(folder).as_posix(): file.parent for file in found}
    return {name: names[name] for name in sorted(names) if NAME.fullmatch(name)}


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/hanlin`, by default `~/.cache/hanlin`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hanlin"


def models_folder() -> Path:
    return cache_folder() / "models"


def downloads_folder() -> Path:
    return cache_folder() / "downloads"
