"""Conversations from the files people have: Alpaca, ShareGPT and OpenAI messages, as .json, .jsonl or .parquet.

    Alpaca     {"instruction": ..., "input": ..., "output": ..., "system"?: ..., "history"?: [[question, answer], ...]}
    ShareGPT   {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}], "system"?: ...}
    OpenAI     {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], "system"?: ...}

Tools are declared in a column `tools`; they are called and answered in turns (`align.messages`):

    ShareGPT   {"from": "function_call", "value": '{"name": ..., "arguments": {...}}'}, {"from": "observation", ...}
    OpenAI     {"role": "assistant", "reasoning_content"?: ..., "tool_calls": [...]}, {"role": "tool", "content": ...}

The format is found once a file, from its first row, and every row must keep to it. A row that cannot be read is
answered with file, row, what was found and what was expected. What would change the meaning and is not supported
(images) is refused by name; columns that only describe a row (`id`, `source`) are metadata and left alone.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hanlin.align.messages import Conversation, Message, RowError, pair_results, read_calls, read_tools
from hanlin.core.errors import HanlinError, require
from hanlin.core.text_sources import decoded, kind

Format = Literal["alpaca", "sharegpt", "openai"]

__all__ = ["Conversation", "Message", "Reading", "read_conversations"]

ROLES = {  # every spelling in use -> the roles of a chat template
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "tool": "tool",
    "ipython": "tool",
}
CALLING = {"function_call", "tool_call"}  # roles whose text is a call of a tool
UNSUPPORTED = ("images", "image", "videos", "audios")
EXPECTED = (
    "Expected Alpaca (`instruction`, `output`, perhaps `input`), ShareGPT (`conversations`: a list of "
    '{"from", "value"}) or OpenAI messages (`messages`: a list of {"role", "content"})'
)


@dataclass(frozen=True)
class Reading:
    """What a file gave. skipped: why a row was left out, one sentence a row (only with `bad_rows="skip"`)."""

    conversations: list[Conversation]
    skipped: list[str]


def read_conversations(
    files: Iterable[str | os.PathLike[str]], *, bad_rows: Literal["stop", "skip"] = "stop"
) -> Reading:
    """All conversations of `files`, in order.

    bad_rows "stop": the first unreadable row raises `HanlinError`. "skip": it is left out and listed in `skipped`;
    a file of which nothing is left raises all the same.
    """
    conversations: list[Conversation] = []
    skipped: list[str] = []
    for file in map(Path, files):
        before, unread = len(conversations), len(skipped)
        form: Format | None = None
        for number, row in read_rows(file):
            where = f"{file}, row {number}"
            try:
                if not isinstance(row, Mapping):
                    raise RowError(f"{where} is a JSON {_json_name(row)}, not an object. {EXPECTED}.")
                form = form or detect_format(row, where)
                conversations.append(parse_row(row, form, where, f"{file.name}:{number}"))
            except RowError as error:
                if bad_rows == "stop":
                    raise RowError(
                        f"{error} Mend the row, or set `objective.bad_rows: skip` to go on without such rows."
                    ) from error
                skipped.append(str(error))
        if len(conversations) == before:
            first = f" Every row was skipped; the first: {skipped[unread]}" if len(skipped) > unread else ""
            raise HanlinError(f"{file} holds no conversation.{first or ' It has no rows.'}")
    return Reading(conversations, skipped)


def read_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a JSON array, of JSON lines (told apart by the first character) or of a parquet file.

    For JSON lines the number is the line's; blank lines are passed over. `.gz` and `.zst` are unpacked.
    """
    if not file.is_file():
        raise HanlinError(f"{file} does not exist or is no file; expected a .json, .jsonl or .parquet file of rows.")
    if kind(file) == ".parquet":
        yield from enumerate(_parquet_rows(file), start=1)
        return
    text = "".join(decoded(file))
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise HanlinError(f"{file} is not valid JSON: {error}.") from error
        yield from enumerate(rows, start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise HanlinError(
                f"{file}, line {number} is not valid JSON: {error}. Expected a JSON array of rows, or one JSON object "
                "a line."
            ) from error


def _parquet_rows(file: Path) -> Iterator[Any]:
    require("pyarrow", "parquet")
    try:
        with require("pyarrow.parquet", "parquet").ParquetFile(file) as table:
            for batch in table.iter_batches(1024):
                yield from map(_without_nulls, batch.to_pylist())
    except (OSError, ValueError) as error:
        raise HanlinError(f"{file} is not a whole parquet file: {error}.") from error


def detect_format(row: Mapping[str, Any], where: str) -> Format:
    """Which of the three formats a row is written in, from its columns."""
    if "instruction" in row and "output" in row:
        return "alpaca"
    for column in ("conversations", "messages"):
        turns = row.get(column)
        if isinstance(turns, Sequence) and turns and isinstance(turns[0], Mapping):
            if "from" in turns[0] and "value" in turns[0]:
                return "sharegpt"
            if "role" in turns[0]:
                return "openai"
            raise RowError(f"{where}: the turns of `{column}` have the keys {_names(turns[0])}. {EXPECTED}.")
    raise RowError(f"{where} has the columns {_names(row)}. {EXPECTED}.")


def parse_row(row: Mapping[str, Any], form: Format, where: str, name: str) -> Conversation:
    """The conversation of one row, checked."""
    _refuse_unsupported(row, where)
    messages = _alpaca(row, where) if form == "alpaca" else _turns(row, form, where)
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError(f"{where}: `system` is a JSON {_json_name(system)}, expected text.")
    if system and system.strip():
        if messages and messages[0].role == "system":
            raise RowError(f"{where} has a system message both in `system` and in its turns; one of them must go.")
        messages.insert(0, Message("system", system))
    while messages and messages[-1].role != "assistant":  # an unanswered question at the end teaches nothing
        messages.pop()
    if not messages:
        raise RowError(f"{where} has no turn of the assistant, so there is nothing to learn from it.")
    for place, message in enumerate(messages, start=1):
        if message.role == "system" and place > 1:
            raise RowError(f"{where}, turn {place}: a system message is only understood as the first turn.")
        if message.role == "assistant" and not message.content.strip() and not message.calls:
            raise RowError(f"{where}, turn {place}: the assistant's turn is empty.")
    return Conversation(tuple(messages), name, _declared(row, where))


def _declared(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row, which may also be declared in its system turn."""
    turns = row.get("messages") or row.get("conversations") or ()
    first = turns[0] if isinstance(turns, Sequence) and turns and isinstance(turns[0], Mapping) else {}
    places = [found for found in (row.get("tools"), row.get("functions"), first.get("tools")) if found]
    if len(places) > 1:
        raise RowError(f"{where} declares tools in several places (`tools`, `functions`, a turn); one must do.")
    return read_tools(places[0], where) if places else ()


def _alpaca(row: Mapping[str, Any], where: str) -> list[Message]:
    messages = []
    history = row.get("history") or []
    if not isinstance(history, Sequence) or any(
        not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 for pair in history
    ):
        raise RowError(f"{where}: `history` must be a list of [question, answer] pairs.")
    for pair in history:
        messages.append(Message("user", _text(pair[0], where, "history")))
        messages.append(Message("assistant", _text(pair[1], where, "history")))
    for column in ("instruction", "output"):
        if column not in row:
            raise RowError(f"{where} has no column `{column}`; it has {_names(row)}, and its file began as Alpaca.")
    question = _text(row["instruction"], where, "instruction")
    extra = _text(row.get("input") or "", where, "input")
    question = f"{question}\n{extra}" if extra.strip() and question.strip() else question or extra
    if not question.strip():
        raise RowError(f"{where}: `instruction` and `input` are both empty.")
    return [*messages, Message("user", question), Message("assistant", _text(row["output"], where, "output"))]


def _turns(row: Mapping[str, Any], form: Format, where: str) -> list[Message]:
    role_key, text_key = ("from", "value") if form == "sharegpt" else ("role", "content")
    column = next((c for c in ("conversations", "messages") if c in row), None)
    turns = row[column] if column else None
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        found = f"`{column}` is a JSON {_json_name(turns)}" if column else f"the columns are {_names(row)}"
        raise RowError(f"{where}: {found}; expected a list of turns, as in the file's first row.")
    messages: list[Message] = []
    asked: list[str | None] = []
    for place, turn in enumerate(turns, start=1):
        here = f"{where}, turn {place}"
        if not isinstance(turn, Mapping) or role_key not in turn:
            found = f"has the keys {_names(turn)}" if isinstance(turn, Mapping) else f"is a JSON {_json_name(turn)}"
            raise RowError(f'{here} {found}; expected {{"{role_key}", "{text_key}"}}, as in the file\'s first row.')
        _refuse_unsupported(turn, here)
        name = turn[role_key]
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            known = ", ".join(sorted(ROLES))
            raise RowError(f"{here} has the unknown role {name!r}; expected one of {known}.")
        if name in CALLING:
            said = Message(role, "", _weight(turn, role, here), calls=tuple(read_calls(turn.get(text_key), here)))
            before = messages[-1] if messages else None
            if before and before.role == "assistant" and not before.calls and before.trained == said.trained:
                asked.pop()  # what it said as it called belongs to the call's turn
                said = replace(messages.pop(), calls=said.calls)
        elif role == "assistant":
            said = _said(turn, text_key, here)
        else:
            said = Message(role, _text(turn.get(text_key), here, text_key))
        messages.append(said)
        asked.append(turn.get("tool_call_id") if role == "tool" else None)
    return pair_results(messages, asked, where)


def _said(turn: Mapping[str, Any], text_key: str, where: str) -> Message:
    """An assistant's turn: text, reasoning and calls, each under its own key or as parts of the content."""
    content = turn.get(text_key)
    thoughts = [_text(turn[key], where, key) for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key)]
    calls = [call for key in ("tool_calls", "function_call") if turn.get(key) for call in read_calls(turn[key], where)]
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        apart = {kind: [part for part in content if part.get("type") == kind] for kind in ("reasoning", "tool_call")}
        thoughts += [_text([{**part, "type": "text"}], where, "reasoning") for part in apart["reasoning"]]
        calls += [call for part in apart["tool_call"] for call in read_calls(part.get("value"), where)]
        content = [part for part in content if part.get("type") not in apart]
    if content is None and calls:
        content = ""
    text, trained = _text(content, where, text_key), _weight(turn, "assistant", where)
    return Message("assistant", text, trained, "\n".join(thoughts) or None, tuple(calls))


def _text(value: Any, where: str, column: str) -> str:
    """A string, or a list of text parts ({"type": "text", "text" or "value": ...}) joined."""
    if isinstance(value, str):
        half = next((at for at, letter in enumerate(value) if "\ud800" <= letter <= "\udfff"), None)
        if half is not None:  # JSON can spell it ("\\ud83d"), no encoding of text can hold it
            raise RowError(
                f"{where}: `{column}` holds half a character (the lone surrogate U+{ord(value[half]):04X}) at {half}."
            )
        return value
    if isinstance(value, Sequence) and all(isinstance(part, Mapping) for part in value):
        kinds = {str(part.get("type")) for part in value} - {"text"}
        if kinds:
            raise RowError(f"{where}: content of type {', '.join(sorted(kinds))} is not supported, only text.")
        texts = [part.get("text", part.get("value")) for part in value]
        if all(isinstance(text, str) for text in texts):
            return _text("".join(texts), where, column)
    raise RowError(f"{where}: `{column}` is a JSON {_json_name(value)}, expected text.")


def _weight(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """`weight` (OpenAI) or `loss_weight` of an assistant's turn: 1 is trained, 0 is only read."""
    for key in ("weight", "loss_weight"):
        if role == "assistant" and turn.get(key) is not None:
            if turn[key] not in (0, 1):
                raise RowError(f"{where}: `{key}` is {turn[key]!r}; only 0 (not trained) and 1 are supported.")
            return bool(turn[key])
    return True


def _refuse_unsupported(row: Mapping[str, Any], where: str) -> None:
    for key in UNSUPPORTED:
        value = row.get(key)
        if value and value != "[]":
            raise RowError(f"{where} has `{key}`, which fine-tuning does not support (text turns only).")


def _without_nulls(value: Any) -> Any:
    """Without the keys that a table fills up with null: its rows share one schema, a JSON file's do not."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _json_name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, Mapping) else "array"


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in row) or "none"
