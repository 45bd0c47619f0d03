"""The errors a user can cause, and how a missing extra is named.

An expected error is one clear paragraph: what was found, where, what was expected, what to do next.
The command line prints it and exits with 2; the server answers 4xx. Anything else is a bug and shows its traceback.
"""

from importlib import import_module
from types import ModuleType


class HanlinError(Exception):
    """An expected error: its text is written for the person who made the mistake."""


class MissingExtraError(HanlinError):
    """A command needs a package that is an optional extra of Hanlin."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs the package {package!r}, which is not installed. It belongs to the extra {extra!r}: "
            f"pip install -c constraints.txt -e '.[{extra}]'"
        )


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or raise `MissingExtraError` that names the extra and the pip line."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(module.split(".")[0], extra) from error
