"""A conversation as a file: JSON that comes back whole, Markdown to read.

The JSON holds `messages` as OpenAI writes them (the path that is shown, of the first column), so that other programs
can use it, and below `hanlin` the whole tree. A file of messages alone, or a bare list of them, can be read too.

    {"messages": [{"role": "user", "content": "…"}, …],
     "hanlin": {"version": 1, "system": "…", "turns": [{"parent": null, "chosen": true, "question": "…",
                "answers": [[{"model": "…", "content": "…"}], []], "shown": [0, -1]},
                {"parent": 0, "under": [0, -1], …}, …]}}

A turn's parent is the number of an earlier turn, `under` which of its answers the turn follows. The probabilities of
tokens are not written.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.engine import Usage
from hanlin.studio.answer import Answer
from hanlin.studio.conversation import COLUMNS, NONE, Chosen, Conversation, Fork, Turn

VERSION = 1
LARGEST = 8_000_000  # bytes of a file
MOST = 10_000  # turns
FIGURES = ("prompt_tokens", "cached_tokens", "completion_tokens", "first_token_s", "total_s")

Talk = Conversation[Answer]


def write_json(talk: Talk) -> str:
    """The file's text."""
    turns: list[dict[str, Any]] = []
    waiting: list[tuple[Fork[Answer], int | None, Chosen | None]] = [(talk.start, None, None)]
    while waiting:
        fork, parent, under = waiting.pop()
        for number, turn in enumerate(fork.turns):
            place = {} if under is None else {"under": list(under)}
            answers = [[_write_answer(answer) for answer in column] for column in turn.answers]
            turns.append(
                {
                    "parent": parent,
                    **place,
                    "chosen": number == fork.shown,
                    "question": turn.question,
                    "answers": answers,
                    "shown": list(turn.shown),
                }
            )
            waiting += [(later, len(turns) - 1, chosen) for chosen, later in turn.later.items()]
    tree = {"version": VERSION, "system": talk.system, "turns": turns}
    return json.dumps({"messages": talk.messages(), "hanlin": tree}, ensure_ascii=False, indent=1)


def read_json(raw: bytes | str) -> Talk:
    """The conversation of a file. Raises `HanlinError` for what is none."""
    if len(raw) > LARGEST:
        raise HanlinError(f"The file has {len(raw):,} bytes; a conversation has at most {LARGEST:,}.")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HanlinError(f"The file is not JSON: {error}.") from error
    if isinstance(found, Mapping) and "hanlin" in found:
        return _read_tree(found["hanlin"])
    messages = found.get("messages") if isinstance(found, Mapping) else found
    if not isinstance(messages, list):
        raise HanlinError('The file has no conversation. Expected {"messages": [{"role": …, "content": …}, …]}.')
    return _read_messages(messages)


def write_markdown(talk: Talk, *, user: str, system: str, made: str) -> str:
    """The shown path to read: a heading for each question and each model's answer. The words are the page's."""
    parts = [f"# {made}\n"]
    if talk.system:
        parts.append(f"## {system}\n\n{talk.system}\n")
    for turn in talk.path():
        parts.append(f"## {user}\n\n{turn.question}\n")
        for column in range(COLUMNS):
            answer = turn.answer(column)
            if answer is not None:
                parts.append(f"## {answer.model or 'assistant'}\n\n{answer.text}\n")
    return "\n".join(parts)


def _write_answer(answer: Answer) -> dict[str, Any]:
    entry: dict[str, Any] = {"model": answer.model, "content": answer.text}
    if answer.usage is not None:
        entry["usage"] = {name: value for name, value in asdict(answer.usage).items() if name in FIGURES}
    if answer.ended is not None:
        entry["finish_reason"] = answer.ended
    return entry


# -- reading: nothing in a file is trusted -----------------------------------------------------------------------------


def _read_messages(messages: Sequence[Any]) -> Talk:
    talk: Talk = Conversation()
    turns: list[Turn[Answer]] = []
    for number, message in enumerate(messages):
        where = f"Message {number}"
        if not isinstance(message, Mapping):
            raise HanlinError(f"{where} is no object with a role and a content.")
        role, content = message.get("role"), _read_content(message.get("content"), where)
        if role in ("system", "developer"):
            if number:
                raise HanlinError(f"{where} is a system prompt; it can only be the first.")
            talk = replace(talk, system=content)
        elif role == "user":
            turns.append(Turn(content))
        elif role == "assistant":
            if not turns or turns[-1].answers[0]:
                raise HanlinError(f"{where} is an answer, but no question stands before it.")
            answer = _whole_answer("", content)
            turns[-1] = replace(turns[-1], answers=((answer,), ()), shown=(0, NONE))
        else:
            raise HanlinError(f"{where} has the role {role!r}; this page holds system, user and assistant.")
    if len(turns) > MOST:
        raise HanlinError(f"The conversation has {len(turns)} turns; the page holds {MOST}.")
    fork: Fork[Answer] = Fork()
    for turn in reversed(turns):
        fork = Fork((replace(turn, later={turn.shown: fork} if fork.turns else {}),), 0)
    return replace(talk, start=fork)


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, list):  # OpenAI's parts
        wrong = [part for part in content if not (isinstance(part, Mapping) and isinstance(part.get("text"), str))]
        if wrong:
            raise HanlinError(f"{where} has a part that is no text; this page holds text only.")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise HanlinError(f"{where} has no text as its content.")
    return content.encode("utf-8", "replace").decode()  # JSON can hold halves of characters


def _read_tree(tree: Any) -> Talk:
    if not isinstance(tree, Mapping) or tree.get("version") != VERSION or not isinstance(tree.get("turns"), list):
        raise HanlinError(f"The file's part `hanlin` is not a conversation of version {VERSION}.")
    entries = tree["turns"]
    if len(entries) > MOST:
        raise HanlinError(f"The conversation has {len(entries)} turns; the page holds {MOST}.")
    children: dict[int | None, dict[Chosen | None, list[tuple[Turn[Answer], bool]]]] = {}
    for number in range(len(entries) - 1, -1, -1):  # those that follow a turn are read before it
        try:
            turn, parent, under, chosen = _read_turn(entries[number], number)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise HanlinError(f"Turn {number} of the file is damaged ({error!r}).") from error
        later = {key: _make_fork(turns) for key, turns in children.pop(number, {}).items() if key is not None}
        turn = replace(turn, later=later)
        children.setdefault(parent, {}).setdefault(under, []).append((turn, chosen))
    roots = children.get(None, {}).get(None, [])
    return Conversation(_read_content(tree.get("system", ""), "The system prompt"), _make_fork(roots))


def _make_fork(turns: Sequence[tuple[Turn[Answer], bool]]) -> Fork[Answer]:
    """Of turns in reversed order."""
    ordered = list(reversed(turns))
    shown = next((number for number, (_, chosen) in enumerate(ordered) if chosen), len(ordered) - 1)
    return Fork(tuple(turn for turn, _ in ordered), shown)


def _read_turn(entry: Mapping[str, Any], number: int) -> tuple[Turn[Answer], int | None, Chosen | None, bool]:
    columns = [tuple(_read_answer(each) for each in column) for column in entry["answers"]]
    parent = entry["parent"]
    under = None if parent is None else _read_chosen(entry["under"])
    if len(columns) != COLUMNS:
        raise ValueError(f"{len(columns)} columns of answers")
    if parent is not None and not 0 <= int(parent) < number:
        raise ValueError(f"its parent is {parent}")
    shown = _read_chosen(entry["shown"])
    for column, index in zip(columns, shown, strict=True):
        if not NONE <= index < len(column):
            raise ValueError(f"it shows answer {index} of {len(column)}")
    question = _read_content(entry["question"], f"Turn {number}")
    return Turn(question, tuple(columns), shown), parent, under, bool(entry.get("chosen"))


def _read_chosen(value: Any) -> Chosen:
    chosen = tuple(int(each) for each in value)
    if len(chosen) != COLUMNS:
        raise ValueError(f"{len(chosen)} columns")
    return chosen


def _read_answer(entry: Mapping[str, Any]) -> Answer:
    answer = _whole_answer(
        _read_content(entry["model"], "A model's name"), _read_content(entry["content"], "An answer")
    )
    figures = entry.get("usage")
    if isinstance(figures, Mapping):
        answer.usage = Usage(
            *(int(figures.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")),
            float(figures.get("first_token_s", 0.0)),
            float(figures.get("total_s", 0.0)),
            cached_tokens=int(figures.get("cached_tokens", 0)),
        )
    if entry.get("finish_reason") in ("length", "abort"):
        answer.ended = entry["finish_reason"]
    return answer


def _whole_answer(model: str, text: str) -> Answer:
    answer = Answer(model, text=text)
    answer.ended = "stop"
    return answer
