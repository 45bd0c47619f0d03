"""The parser of a simple verb: argparse, which costs milliseconds, with every verb's help in one shape."""

import argparse
import difflib
from collections.abc import Sequence
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
