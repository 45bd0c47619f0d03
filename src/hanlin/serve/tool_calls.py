"""Tool calls, read while they are written.

The formats stand in `tool_formats`. The parser works character by character, as if all the text were there (every
`yield` waits for more), so its pieces joined do not depend on how the text was cut. It holds back what may become a
call until that is decided: what only looks like one is content again. From the moment a call's name is known its
arguments are passed on as they are written. Blanks between calls, before the first and behind the last are dropped.
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Any

from hanlin.serve.tool_formats import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, OPENINGS, SEPARATOR, ToolFormat

LONGEST_NAME = 256  # characters; what goes on longer is no name
BLANK = frozenset(string.whitespace)
JSON_LETTERS = BLANK | frozenset('{}[]:,"+-.0123456789eEtrufalsn')  # outside strings
BARE_KEYS = ("type", "id", "name", "arguments", "parameters")


@dataclass(frozen=True)
class Content:
    """Ordinary text of the answer."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins. index: 0, 1 … in the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next piece of a call's arguments (JSON text, as the model wrote it)."""

    index: int
    text: str


Delta = Content | CallStart | Arguments
Reading = Generator[None, None, Any]


class ToolParser:
    """Takes the text of one answer piece by piece and gives what is certain.

    names: the tools there are; a bare JSON object (llama) is a call only if it names one of them. new_id: makes the id
    of a call; Mistral's have nine letters and digits, on which its templates insist.
    """

    def __init__(
        self, form: ToolFormat, *, names: Collection[str] = (), new_id: Callable[[], str] | None = None
    ) -> None:
        self._names = frozenset(names)
        self._bare = form.name == "llama"
        self._openings = OPENINGS[form.name]
        self._read_calls: Callable[[], Reading] = {
            "hermes": self._hermes,
            "llama": self._objects,
            "mistral": self._mistral,
            "mistral-args": self._mistral,
            "deepseek": self._deepseek,
            "deepseek-plain": self._deepseek,
        }[form.name]
        self._new_id = new_id or (_short_id if form.name.startswith("mistral") else _long_id)
        firsts = re.escape("".join({opening[0] for opening in self._openings}))
        self._plain = re.compile(rf"[^\s{firsts}]+")
        self._text, self._at, self._closed = "", 0, False
        self._due: list[Delta] = []
        self._reading = self._answer()
        self.calls = 0  # begun so far

    def push(self, text: str) -> list[Delta]:
        """The next piece of the text."""
        self._text += text
        return self._go_on()

    def finish(self) -> list[Delta]:
        """No more text: the rest."""
        self._closed = True
        return self._go_on()

    def _go_on(self) -> list[Delta]:
        next(self._reading, None)
        due, self._due = self._due, []
        return due

    def _answer(self) -> Reading:
        while True:
            begun = self._at
            yield from self._space()
            here = self._at
            if not (yield from self._peek()):
                if begun < self._at and not self.calls:
                    self._due.append(Content(self._text[begun:]))
                return
            before = self.calls
            if self._bare and begun == 0 and self._text[here] == "{":
                yield from self._objects(bare=True)
            elif (yield from self._literal(*self._openings)):
                yield from self._read_calls()
            if self.calls > before:
                continue
            if here == self._at:
                plain = self._plain.match(self._text, here)
                self._at = plain.end() if plain else here + 1
            self._due.append(Content(self._text[begun : self._at]))

    def _hermes(self) -> Reading:
        yield from self._space()
        if (yield from self._object()):
            while (yield from self._peek()) in BLANK | {"}"}:  # one bracket too many is a common slip
                self._at += 1
            yield from self._literal("</tool_call>")

    def _objects(self, *, bare: bool = False) -> Reading:
        """Objects one behind the other, with or without semicolons."""
        yield from self._space()
        while (yield from self._object(bare=bare)):
            mark = self._at
            yield from self._space()
            if (yield from self._literal(";")):
                yield from self._space()
            if (yield from self._peek()) != "{":
                self._at = mark
                return

    def _mistral(self) -> Reading:
        yield from self._space()
        if not (yield from self._literal("[")):
            yield from self._named_arguments()
            return
        yield from self._space()
        while (yield from self._object()):
            yield from self._space()
            if not (yield from self._literal(",")):
                break
            yield from self._space()
        yield from self._literal("]")

    def _named_arguments(self) -> Reading:
        begun = self._at
        name = yield from self._until("[CALL_ID]", "[ARGS]", "{")
        if self._text.endswith("[CALL_ID]", begun, self._at) and (yield from self._until("[ARGS]", "{")) is None:
            return
        if self._text.endswith("{", begun, self._at):
            self._at -= 1
        if name and name.strip():
            yield from self._call(name.strip())

    def _deepseek(self) -> Reading:
        if self._text.endswith(CALLS_BEGIN, 0, self._at):
            yield from self._space()
            if not (yield from self._literal(CALL_BEGIN)):
                return
        mark = self._at
        while name := (yield from self._until(SEPARATOR)):
            yield from self._space()
            if (yield from self._peek()) != "{":  # that was the kind, always "function"
                name = yield from self._until("\n")
                yield from self._literal("```json")
            if not name or not name.strip():
                break
            yield from self._call(name.strip())
            yield from self._space()
            yield from self._literal("```")
            yield from self._space()
            yield from self._literal(CALL_END)
            mark = self._at
            yield from self._space()
            if (yield from self._literal(CALLS_END)):
                return
            if not (yield from self._literal(CALL_BEGIN)):
                break
        self._at = mark

    def _object(self, *, bare: bool = False) -> Reading:
        """{"name": …, "arguments": …}, whichever comes first; False, and nothing is read, if no call stands here."""
        mark = self._at
        good = yield from self._read_object(bare=bare)
        if not good:
            self._at = mark
        return good

    def _read_object(self, *, bare: bool) -> Reading:
        if not (yield from self._literal("{")):
            return False
        name: str | None = None
        arguments: str | None = None
        begun = False
        while True:
            yield from self._space()
            sign = yield from self._literal("}", ",")
            if sign == "}":
                break
            if sign == ",":
                continue
            key = yield from self._string()
            yield from self._space()
            if key is None or not (yield from self._literal(":")) or (bare and key not in BARE_KEYS):
                return begun
            yield from self._space()
            if key == "name" and name is None:
                name = yield from self._string()
                if not name or (bare and name not in self._names):
                    return False
            elif key in ("arguments", "parameters") and name and not begun:
                begun = True
                yield from self._call(name)
            elif key in ("arguments", "parameters") and arguments is None:
                arguments = yield from self._value()
            elif not (yield from self._value()):
                return begun
        if name and not begun and (arguments or not bare):
            self._start(name)
            self._argue(_unquoted(arguments or "{}"))
            begun = True
        return begun

    def _call(self, name: str) -> Reading:
        """A call whose arguments stand here."""
        self._start(name)
        yield from self._space()
        if (yield from self._peek()) == "{":
            yield from self._value(passing_on=True)
        else:  # JSON inside a string, or nothing
            self._argue(_unquoted((yield from self._value())))

    def _start(self, name: str) -> None:
        self._due.append(CallStart(self.calls, self._new_id(), name))
        self.calls += 1

    def _argue(self, text: str) -> None:
        if text:
            self._due.append(Arguments(self.calls - 1, text))

    def _value(self, *, passing_on: bool = False) -> Reading:
        """The text of the JSON value that stands here, or as much of it as is JSON; passing_on: as arguments."""
        begun = sent = self._at
        depth, quoted, escaped = 0, False, False
        while True:
            if passing_on and self._at == len(self._text):
                self._argue(self._text[sent:])
                sent = self._at
            char = yield from self._peek()
            if not char or not (quoted or char in JSON_LETTERS):
                break
            if not quoted and not depth and (char in BLANK or char in ",}]"):
                break
            self._at += 1
            if escaped or (quoted and char == "\\"):
                escaped = not escaped
            elif char == '"':
                quoted = not quoted
            elif not quoted:
                depth += (char in "{[") - (char in "}]")
            if not quoted and not depth and char in '"}]':
                break
        if passing_on:
            self._argue(self._text[sent : self._at])
        return self._text[begun : self._at]

    def _string(self) -> Reading:
        """The JSON string that stands here; None if none does."""
        if (yield from self._peek()) != '"':
            return None
        try:
            return json.loads((yield from self._value()), strict=False)
        except ValueError:
            return None

    def _until(self, *marks: str) -> Reading:
        """The text before the first of these, and the place behind it; None, and nothing is read, if it is far."""
        begun = self._at
        while self._at - begun <= LONGEST_NAME and (yield from self._peek()):
            here = self._at
            if (yield from self._literal(*marks)):
                return self._text[begun:here]
            self._at += 1
        self._at = begun
        return None

    def _literal(self, *options: str) -> Reading:
        """The one of these that stands here, which is passed; or "", and nothing is."""
        length = 0
        while True:
            while self._at + length >= len(self._text):
                if self._closed:
                    return ""
                yield
            length += 1
            piece = self._text[self._at : self._at + length]
            if piece in options:
                self._at += length
                return piece
            if not any(option.startswith(piece) for option in options):
                return ""

    def _space(self) -> Reading:
        while (yield from self._peek()) in BLANK:
            self._at += 1

    def _peek(self) -> Reading:
        """The next character, "" at the end."""
        while self._at >= len(self._text):
            if self._closed:
                return ""
            yield
        return self._text[self._at]


def _unquoted(value: str) -> str:
    """Arguments that were written as a string that holds JSON, or left out."""
    if value in ("", "null"):
        return "{}"
    try:
        inner = json.loads(value) if value.startswith('"') else None
    except ValueError:
        return value
    return inner if isinstance(inner, str) and inner.lstrip().startswith("{") else value


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
