"""A matplotlib figure as a file: its ending says the format, and the file is whole or not there."""

from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_path

FORMATS = ("png", "svg", "pdf")


def figure_format(path: Path) -> str:
    """`png`, `svg` or `pdf`, by the ending; another ending, and the name of a folder, are a `HanlinError`."""
    found = path.suffix.lstrip(".").lower()
    if found not in FORMATS:
        raise HanlinError(f"{path} is no name for a figure: it must end in .{', .'.join(FORMATS)}.")
    if path.is_dir():
        raise HanlinError(f"{path} is a folder; a figure is a file.")
    return found


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write `figure` to `path`, in folders that are made as needed. options: of `Figure.savefig`."""
    kind = figure_format(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, **options)
