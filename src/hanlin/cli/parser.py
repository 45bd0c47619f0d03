"""The parser of a simple verb: argparse, which costs milliseconds, with every verb's help in one shape.

parser.add_argument("--users", type=count)      1 or more; `whole`: 0 or more
parser.add_argument("--tokens", type=amount)    above 0, also 15e12 or 15T; `size`: 0, too
parser.add_argument("--png", type=figure)       png, svg or pdf
"""

import argparse
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hanlin.core.errors import HanlinError


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a `HanlinError`: one paragraph, nearest neighbour named, the usage line after it."""

    def error(self, message: str) -> NoReturn:
        raise HanlinError(
            f"{message[:1].upper()}{message[1:]}.{self._neighbour(message)}\n{self.format_usage().strip()}"
        )

    def _neighbour(self, message: str) -> str:
        known = [flag for action in self._actions for flag in action.option_strings]
        _, found, rest = message.partition("unrecognized arguments: ")
        if not found:
            return ""
        near = difflib.get_close_matches(rest.split()[0].split("=")[0], known, n=1)
        return f" Did you mean `{near[0]}`?" if near else ""


def make_parser(verb: str, description: str, *, examples: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser for `hanlin VERB` with `--quiet` and, below its help, examples (whole command lines)."""
    shown = "\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None
    parser = Parser(
        prog=f"hanlin {verb}",
        description=description,
        epilog=shown,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result and errors")
    return parser


def count(text: str) -> int:
    """A whole number of 1 or more."""
    return _at_least(1, text)


def whole(text: str) -> int:
    """A whole number of 0 or more."""
    return _at_least(0, text)


def amount(text: str) -> float:
    """A finite number above 0, also as 15e12 or 15T."""
    number = size(text)
    if number == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def size(text: str) -> float:
    """A finite number of 0 or more, also as 15e12 or 15T."""
    units = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
    unit = units.get(text[-1:].lower())
    try:
        number = float(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 2.5, 15e12 or 15T")
    return number


def figure(text: str) -> Path:
    """The path of a figure that can be written: its ending says the format."""
    from hanlin.core.figures import figure_format

    path = Path(text)
    figure_format(path)
    return path


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
    return number
