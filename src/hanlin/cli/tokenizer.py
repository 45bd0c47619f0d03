"""`hanlin tokenizer train FILE… --vocab-size N --out DIR` and `hanlin tokenizer show TEXT [--tokenizer DIR]`."""

import argparse
import sys
from itertools import cycle
from typing import TYPE_CHECKING

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError

if TYPE_CHECKING:
    from rich.text import Text

    from hanlin.tokens import Tokenizer

COLOURS = ("black on cyan", "black on yellow", "black on green", "black on magenta", "black on blue")


def main(argv: list[str]) -> None:
    """Run `hanlin tokenizer`."""
    parser = make_parser(
        "tokenizer",
        "Train a tokenizer; show how it cuts a text.",
        examples=[
            "hanlin tokenizer train corpus.txt chats.jsonl --vocab-size 4096 --out runs/tokenizer",
            'hanlin tokenizer show "Hello, 世界! 12 + 30" --tokenizer runs/tokenizer',
            "hanlin tokenizer show - --tokenizer runs/tokenizer < file.py",
        ],
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="train|show")
    train = verbs.add_parser("train", help="byte-level BPE from text files", allow_abbrev=False)
    train.add_argument("files", nargs="+", metavar="FILE", help="txt, jsonl, json, parquet, also .gz or .zst; folders")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of tokens, special ones too")
    train.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    train.add_argument("--special", action="append", default=[], metavar="TOKEN", help="one more special token")
    train.add_argument("--field", default="text", metavar="NAME", help="where the text of a row stands (default: text)")
    show = verbs.add_parser("show", help="the pieces of a text, in colour, with their ids", allow_abbrev=False)
    show.add_argument("text", metavar="TEXT", help="the text, or - to read it from stdin")
    show.add_argument("--tokenizer", metavar="DIR", default=".", help="tokenizer or model folder (default: this one)")
    show.add_argument("--special", action="store_true", help="special tokens in the text count as such")
    arguments = parser.parse_args(argv)
    {"train": _train, "show": _show}[arguments.verb](arguments)


def _train(arguments: argparse.Namespace) -> None:
    from hanlin.core.progress import say
    from hanlin.tokens import Tokenizer

    tokenizer = Tokenizer.train(
        arguments.files,
        vocab_size=arguments.vocab_size,
        special=arguments.special,
        field=arguments.field,
        quiet=arguments.quiet,
    )
    tokenizer.save(arguments.out)
    if tokenizer.size < arguments.vocab_size:
        say(
            f"The text has only {tokenizer.size:,} tokens to give ({arguments.vocab_size:,} were asked for): no other "
            "pair stands in it twice."
        )
    print(f"{arguments.out}: {tokenizer.size:,} tokens, {len(tokenizer.special)} of them special")


def _show(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from hanlin.tokens import Tokenizer

    tokenizer = Tokenizer.load(arguments.tokenizer)
    text = arguments.text
    if text == "-":
        data = sys.stdin.buffer.read()
        ids = tokenizer.encode_bytes(data)
        letters = len(data.decode("utf-8", errors="replace"))
    else:
        ids = tokenizer.encode(text, special=arguments.special)
        letters = len(text)
    if not ids:
        raise HanlinError("The text is empty: there is nothing to show. Give a text, or - and a text on stdin.")
    size = len(tokenizer.decode_bytes(ids))
    console = Console(soft_wrap=True, highlight=False)
    console.print(pieces(tokenizer, ids, marks=not console.is_terminal))
    console.print(
        f"{len(ids):,} tokens, {letters:,} characters, {size:,} bytes: {size / len(ids):.2f} bytes a token", style="dim"
    )


def pieces(tokenizer: "Tokenizer", ids: list[int], *, marks: bool) -> "Text":
    """Every token in its colour with its id behind it; marks: `|` between tokens, for where there is no colour."""
    from rich.text import Text

    shown = Text()
    for place, (token, colour) in enumerate(zip(ids, cycle(COLOURS), strict=False)):
        if marks and place:
            shown.append("|")
        spelling = visible(tokenizer.token_bytes(token))
        shown.append(spelling, style=colour)
        shown.append(f"{token} " if not marks else f" {token} ", style="dim")
        if spelling.endswith("↵"):
            shown.append("\n")
    return shown


def visible(data: bytes) -> str:
    """A token's bytes so that each can be seen: spaces as ·, line ends as ↵, tabs as →, what is no text as ⟨E4⟩."""
    text = data.decode("utf-8", errors="surrogateescape")
    shown = ""
    for letter in text:
        code = ord(letter)
        if 0xDC80 <= code <= 0xDCFF:
            shown += f"⟨{code - 0xDC00:02X}⟩"
        elif letter in " \n\t":
            shown += {" ": "·", "\n": "↵", "\t": "→"}[letter]
        else:
            shown += letter if letter.isprintable() else f"⟨{letter.encode().hex().upper()}⟩"
    return shown
