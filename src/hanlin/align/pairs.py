"""Preference data: which of several answers to one prompt people (or a judge) liked better.

    pairs      {"prompt": ..., "chosen": ..., "rejected": ..., "margin"?: 0.5}
    unpaired   {"prompt": ..., "completion": ..., "label": true}                            for KTO
    scored     {"prompt": ..., "completion": ..., "score": 0.7}                             for pointwise rewards
    ranked     {"prompt": ..., "completions": [..., ...], "scores": [0.9, 0.1]}             for RRHF, K-wise rewards

A text is one turn; a list of turns ({"role", "content"} or {"from", "value"}) is taken as it is. The prompt may also be
`conversations` or `messages` (then of an unpaired row the last turn is its answer), or be missing where `chosen` and
`rejected` are whole conversations: what they have in common at their beginning is the prompt. Texts of the form
"\\n\\nHuman: ...\\n\\nAssistant: ..." are split into their turns. `system` and `tools` go with the prompt.

Through the chat template each answer becomes one `Example` with a prompt of its own: the prompt is read, the answer's
assistant turns are trained. What cannot teach (answers that are equal, too long ones) is left out and counted.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hanlin.align.conversations import ROLES, parse_row, read_rows
from hanlin.align.messages import Conversation, Message, RowError
from hanlin.align.sft import covering_length
from hanlin.align.template import TrainingTemplate
from hanlin.core.errors import HanlinError
from hanlin.core.progress import Progress
from hanlin.data.examples import Example
from hanlin.tokens import Tokenizer

Form = Literal["pairs", "unpaired", "scored", "ranked"]
Turns = list[Mapping[str, Any]]

DIALOGUE = re.compile(r"\n\n(Human|Assistant):")
EXPECTED = {
    "pairs": '{"prompt", "chosen", "rejected"} (texts or lists of turns; `margin` if there is one)',
    "unpaired": '{"prompt", "completion", "label": true or false}, or {"messages": [...], "label": ...}',
    "scored": '{"prompt", "completion", "score": a number}, or {"messages": [...], "score": ...}',
    "ranked": '{"prompt", "completions": [...], "scores": [...]}',
}


@dataclass(frozen=True)
class Answers:
    """One prompt with its answers. conversations: the prompt, read only, and an answer, once for each answer, in the
    file's order (chosen first); numbers: what is known of each: `margin`, `label` (1 good, 0 bad), `score`."""

    conversations: tuple[Conversation, ...]
    numbers: tuple[Mapping[str, float], ...]
    name: str


@dataclass(frozen=True)
class PreferenceReading:
    """What the files gave. equal: names of rows whose answers are all the same; skipped: why a row could not be read,
    one sentence a row (only with `bad_rows="skip"`)."""

    rows: list[Answers]
    equal: list[str]
    skipped: list[str]


@dataclass(frozen=True)
class PreferenceReport:
    """What became of the rows. Lengths are in tokens, of a prompt with one answer."""

    rows: int
    answers: int
    trained: int
    seq_len: int
    longest: int
    equal: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: one line a fact."""
        lines = [
            f"{self.rows:,} prompts with {self.answers:,} answers, {self.trained:,} tokens of theirs; a prompt with an "
            f"answer has at most {self.seq_len} tokens"
        ]
        for names, what in (
            (self.equal, "rows are left out, their answers are equal, so there is nothing to prefer"),
            (
                self.cut,
                f"answers are longer than {self.seq_len} tokens and cut there (the longest has {self.longest:,})",
            ),
            (
                self.dropped,
                f"prompts are left out, an answer does not fit {self.seq_len} tokens (up to {self.longest:,})",
            ),
        ):
            if names:
                lines.append(f"{len(names):,} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")
        if self.skipped:
            lines.append(f"{len(self.skipped):,} rows are skipped, the first: {self.skipped[0]}")
        return lines


def read_preferences(
    files: Iterable[str | os.PathLike[str]], form: Form, *, bad_rows: Literal["stop", "skip"] = "stop"
) -> PreferenceReading:
    """All rows of `files` (.json, .jsonl, .parquet), in order.

    A row whose answers are equal is no error: it is counted. An unreadable one raises `HanlinError` with file, row and
    what was expected, or with bad_rows "skip" is listed in `skipped`; a file of which nothing is left always raises.
    """
    rows: list[Answers] = []
    equal: list[str] = []
    skipped: list[str] = []
    for file in map(Path, files):
        before = len(rows) + len(equal)
        for number, row in read_rows(file):
            where, name = f"{file}, row {number}", f"{file.name}:{number}"
            try:
                if not isinstance(row, Mapping):
                    raise RowError(f"{where} is no JSON object. Expected {EXPECTED[form]}.")
                found = READERS[form](row, where, name)
            except RowError as error:
                if bad_rows == "stop":
                    advice = "Mend the row, or set `objective.bad_rows: skip` to go on without such rows."
                    raise RowError(f"{error} {advice}") from error
                skipped.append(str(error))
                continue
            if len(found.conversations) > 1 and _all_equal(found):
                equal.append(name)
            else:
                rows.append(found)
        if len(rows) + len(equal) == before:
            first = f" Every row was skipped; the first: {skipped[-1]}" if skipped else " It has no rows."
            raise HanlinError(f"{file} holds no preference.{first}")
    if not rows:
        raise HanlinError(f"All {len(equal)} rows have equal answers, so there is nothing to prefer.")
    return PreferenceReading(rows, equal, skipped)


def preference_examples(
    reading: PreferenceReading,
    tokenizer: Tokenizer,
    *,
    seq_len: int | None = None,
    max_positions: int | None = None,
    overlong: Literal["cut", "drop"] = "drop",
    quiet: bool = True,
) -> tuple[list[list[Example]], PreferenceReport]:
    """Rows -> groups of examples, one for each answer, of at most `seq_len` tokens each.

    seq_len None: the smallest power of two that holds 99.5 % of the answers whole, at most `max_positions`. A longer
    answer takes its whole row with it ("drop") or is cut at its end; a row that is left without a trained token in one
    of its answers, or with equal ones, is dropped. All of it is reported. `HanlinError` if nothing is left.
    """
    template = TrainingTemplate(tokenizer)
    groups = []
    with Progress("tokenise", total=len(reading.rows), unit="prompts", quiet=quiet) as bar:
        for row in reading.rows:
            pairs = zip(row.conversations, row.numbers, strict=True)
            groups.append([replace(template.encode(talk), numbers=numbers) for talk, numbers in pairs])
            bar.advance()
    lengths = [len(example.ids) for group in groups for example in group]
    seq_len = seq_len or covering_length(lengths, max_positions)
    kept, cut, dropped, equal = [], [], [], list(reading.equal)
    for group in groups:
        short = [
            e if len(e.ids) <= seq_len else replace(e, ids=e.ids[:seq_len], trained=e.trained[:seq_len]) for e in group
        ]
        shortened = [new.name for new, old in zip(short, group, strict=True) if new is not old]
        if (shortened and overlong == "drop") or not all(any(example.trained[1:]) for example in short):
            dropped.append(group[0].name)
        elif len(short) > 1 and all(example.ids == short[0].ids for example in short):
            equal.append(group[0].name)
        else:
            cut += shortened
            kept.append(short)
    if not kept:
        raise HanlinError(
            f"None of the {len(groups)} rows can be learnt from: {len(dropped)} do not fit {seq_len} tokens (the "
            f"longest has {max(lengths)}), {len(equal)} have equal answers. Raise `objective.seq_len`, or cut long "
            "answers (`objective.overlong: cut`)."
        )
    trained = sum(sum(example.trained) for group in kept for example in group)
    report = PreferenceReport(
        len(kept), sum(map(len, kept)), trained, seq_len, max(lengths), equal, cut, dropped, reading.skipped
    )
    return kept, report


def _pair(row: Mapping[str, Any], where: str, name: str) -> Answers:
    _expect(row, ("chosen", "rejected"), "pairs", where)
    chosen, rejected = (_turns(row[side], "assistant", where, side) for side in ("chosen", "rejected"))
    prompt = prompt_turns(row, where)
    prompt, (chosen, rejected) = _split(prompt, [chosen, rejected], where, "`chosen` and `rejected`")
    margin = {"margin": 0.0 if row.get("margin") is None else _number(row["margin"], where, "margin")}
    return _answers(row, prompt, [chosen, rejected], [margin, margin], where, name)


def _unpaired(row: Mapping[str, Any], where: str, name: str) -> Answers:
    _expect(row, ("label",), "unpaired", where)
    label = row["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise RowError(f"{where}: `label` is {label!r}; expected true (a good answer) or false.")
    return _single(row, {"label": float(label)}, "unpaired", where, name)


def _scored(row: Mapping[str, Any], where: str, name: str) -> Answers:
    _expect(row, ("score",), "scored", where)
    return _single(row, {"score": _number(row["score"], where, "score")}, "scored", where, name)


def _single(row: Mapping[str, Any], numbers: Mapping[str, float], form: Form, where: str, name: str) -> Answers:
    """The one answer of a row."""
    prompt = prompt_turns(row, where)
    if "completion" in row:
        answer = _turns(row["completion"], "assistant", where, "completion")
    else:
        if not prompt or _role(prompt[-1]) != "assistant":
            raise RowError(
                f"{where} has no `completion` and no answer at the end of its turns. Expected {EXPECTED[form]}."
            )
        prompt, answer = prompt[:-1], prompt[-1:]
    prompt, [answer] = _split(prompt, [answer], where, "`completion`")
    return _answers(row, prompt, [answer], [numbers], where, name)


def _ranked(row: Mapping[str, Any], where: str, name: str) -> Answers:
    _expect(row, ("completions", "scores"), "ranked", where)
    texts, scores = row["completions"], row["scores"]
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores) or len(texts) < 2:
        found = [len(v) if isinstance(v, list) else type(v).__name__ for v in (texts, scores)]
        raise RowError(
            f"{where} has {found[0]} `completions` and {found[1]} `scores`; expected two or more, a score each."
        )
    answers = [_turns(text, "assistant", where, "completions") for text in texts]
    prompt, answers = _split(prompt_turns(row, where), answers, where, "`completions`")
    numbers = [{"score": _number(score, where, "scores")} for score in scores]
    return _answers(row, prompt, answers, numbers, where, name)


READERS: dict[Form, Callable[[Mapping[str, Any], str, str], Answers]] = {
    "pairs": _pair,
    "unpaired": _unpaired,
    "scored": _scored,
    "ranked": _ranked,
}


def _expect(row: Mapping[str, Any], columns: Sequence[str], form: Form, where: str) -> None:
    if missing := [column for column in columns if column not in row]:
        found = ", ".join(f"`{key}`" for key in row) or "none"
        raise RowError(f"{where} has no `{missing[0]}`; its columns are {found}. Expected {EXPECTED[form]}.")


def prompt_turns(row: Mapping[str, Any], where: str) -> Turns:
    """The turns before the answers; none where the answers bring them along."""
    for column in ("prompt", "conversations", "messages", "question"):
        if row.get(column):
            return _turns(row[column], "user", where, column)
    if row.get("instruction"):
        extra = row.get("input")
        return _turns(f"{row['instruction']}\n{extra}" if extra else row["instruction"], "user", where, "instruction")
    return []


def _turns(value: Any, role: str, where: str, column: str) -> Turns:
    """A text, a turn or a list of turns as turns with `role` and `content`."""
    if isinstance(value, str):
        parts = DIALOGUE.split(value)
        if len(parts) == 1 or parts[0].strip():
            return [{"role": role, "content": value}]
        said = zip(parts[1::2], parts[2::2], strict=True)
        turns: Turns = [
            {"role": "user" if who == "Human" else "assistant", "content": text.strip()} for who, text in said
        ]
        return turns if turns[-1]["content"] else turns[:-1]  # a prompt that ends with "\n\nAssistant:"
    given = [value] if isinstance(value, Mapping) else value
    if not isinstance(given, list) or not given or not all(isinstance(turn, Mapping) for turn in given):
        raise RowError(f"{where}: `{column}` is {str(value)[:60]!r}; expected a text or a list of turns.")
    return [_renamed(turn) for turn in given]


def _renamed(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    names = {"from": "role", "value": "content"}
    return {names.get(key, key): value for key, value in turn.items()} if "from" in turn else turn


def _split(prompt: Turns, answers: list[Turns], where: str, what: str) -> tuple[Turns, list[Turns]]:
    """The prompt and the answers without it, where they are whole conversations."""
    whole = [answer for answer in answers if _role(answer[0]) in ("user", "system")]
    if not whole:
        if not prompt:
            raise RowError(f"{where} has no prompt: neither `prompt` nor turns of the user in {what}.")
        return prompt, answers
    if len(whole) < len(answers):
        raise RowError(
            f"{where}: of {what} some are whole conversations and some are answers alone; expected one kind."
        )
    common = 0
    while all(len(answer) > common + 1 and answer[common] == answers[0][common] for answer in answers):
        common += 1
    common = max((at for at in range(common + 1) if at and _role(answers[0][at - 1]) in ("user", "tool")), default=0)
    if len(answers) == 1 and prompt:
        common = len(prompt)
    shared = answers[0][:common]
    if not common or any(_role(answer[common]) != "assistant" for answer in answers if len(answer) > common):
        raise RowError(
            f"{where}: {what} do not begin with the same turns up to an answer, so they have no prompt in common."
        )
    if (
        prompt
        and shared[: len(prompt)] != prompt
        and [t for t in shared if _role(t) != "system"][: len(prompt)] != prompt
    ):
        raise RowError(f"{where}: {what} are whole conversations, but they do not begin with the row's `prompt`.")
    return shared, [answer[common:] for answer in answers]


def _answers(
    row: Mapping[str, Any],
    prompt: Turns,
    answers: list[Turns],
    numbers: Sequence[Mapping[str, float]],
    where: str,
    name: str,
) -> Answers:
    more = {key: row[key] for key in ("system", "tools") if row.get(key)}
    talks = []
    for answer in answers:
        talk = parse_row({"messages": [*prompt, *answer], **more}, "openai", where, name)
        first = len(talk.messages) - len(answer)
        if first < 1 or not any(message.role == "assistant" for message in talk.messages[first:]):
            raise RowError(f"{where}: an answer has no turn of the assistant.")
        read = [replace(message, trained=False) for message in talk.messages[:first]]
        talks.append(replace(talk, messages=(*read, *talk.messages[first:])))
    return Answers(tuple(talks), tuple(numbers), name)


def _role(turn: Mapping[str, Any]) -> str:
    return ROLES.get(turn.get("role", ""), "")


def _number(value: Any, where: str, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"{where}: `{column}` has {value!r}, expected a finite number.")
    return float(value)


def _all_equal(found: Answers) -> bool:
    said: list[tuple[Message, ...]] = [talk.messages for talk in found.conversations]
    return all(messages == said[0] for messages in said)
