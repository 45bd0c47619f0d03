"""Where synthesis begins: tasks and questions from files, with or without answers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hanlin.align.conversations import read_conversations, read_rows
from hanlin.core.errors import HanlinError
from hanlin.core.text_sources import decoded

QUESTIONS, ANSWERS = ("instruction", "question", "prompt", "task"), ("answer", "output", "reference", "solution")


@dataclass(frozen=True)
class Seed:
    """messages: up to and with a user's turn. reference: the known answer, if the file has one. name: `file:row`."""

    messages: tuple[dict[str, str], ...]
    reference: str | None
    name: str

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


def read_seeds(files: Iterable[Path]) -> list[Seed]:
    """Every seed of `files`, in order; one that was there before is left out.

    Conversations (`align.conversations`): what stands before the last answer, and that answer as the reference. Rows
    with `instruction` (and `input`), `question`, `prompt` or `task`, perhaps with `answer`, `output`, `reference` or
    `solution`; Self-Instruct's `instances`. A .txt file: a task a line.
    """
    seeds: dict[str, Seed] = {}
    for file in files:
        found = _lines(file) if file.suffix == ".txt" else _rows(file)
        if not found:
            raise HanlinError(f"{file} holds no seeds: it has no rows.")
        for seed in found:
            seeds.setdefault(str(seed.messages), seed)
    return list(seeds.values())


def _lines(file: Path) -> list[Seed]:
    if not file.is_file():
        raise HanlinError(f"{file} does not exist or is no file; expected a task a line.")
    lines = [line.strip() for line in "".join(decoded(file)).splitlines()]
    return [Seed(_one(line), None, f"{file.name}:{n}") for n, line in enumerate(lines, start=1) if line]


def _rows(file: Path) -> list[Seed]:
    first = next((row for _, row in read_rows(file)), None)
    if first is None:
        return []
    columns = set(first) if isinstance(first, Mapping) else set()
    if {"messages", "conversations"} & columns or {"instruction", "output"} <= columns:
        told = read_conversations([file]).conversations
        return [Seed(tuple(c.plain()[:-1]), c.messages[-1].content, c.name) for c in told]
    return [_seed(row, f"{file}, row {number}", f"{file.name}:{number}") for number, row in read_rows(file)]


def _seed(row: object, where: str, name: str) -> Seed:
    fields = {} if not isinstance(row, Mapping) else row
    question = next((fields[key] for key in QUESTIONS if isinstance(fields.get(key), str)), "")
    if not question.strip():
        known = ", ".join(f"`{key}`" for key in fields) or "no columns"
        raise HanlinError(
            f"{where} has no question: it has {known}; expected one of {', '.join(QUESTIONS)}, or a conversation."
        )
    instances = fields.get("instances")  # as Self-Instruct's own file has it: the first belongs to the task
    fields = {**fields, **instances[0]} if isinstance(instances, list) and instances else fields
    more = fields.get("input")
    reference = next((fields[key] for key in ANSWERS if fields.get(key) is not None), None)
    whole = f"{question}\n{more}" if isinstance(more, str) and more.strip() else question
    return Seed(_one(whole), None if reference is None else str(reference), name)


def _one(question: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": question},)
