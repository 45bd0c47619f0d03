"""Judged answers → packed rows for a reward model: each answer a document that ends with its last token.

    pairwise          (chosen, rejected)        margin
    kwise, listwise   (answer, answer, ...)     score                  side by side in one row: one forward of all
    pointwise         (answer,)                 score or label
    process           (answer,)                 a label, 0 or 1, at the last token of every step

What the chat template writes after an answer's end is cut off: a policy's answer ends there, and is scored there.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hanlin.align.conversations import parse_row, read_rows
from hanlin.align.messages import RowError
from hanlin.align.method import Data
from hanlin.align.pairs import Form as Rows
from hanlin.align.pairs import preference_examples, read_preferences
from hanlin.align.recipe import TrainRecipe
from hanlin.align.reward_recipe import SEPARATOR, RewardObjective
from hanlin.align.sft import covering_length
from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive
from hanlin.data.batch import BatchSource
from hanlin.data.examples import Example
from hanlin.data.packing import PackedExamples
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.tokens import Tokenizer

FIRST = "first"  # of an answer: 1 where a group of compared answers begins
LENGTH = "length"  # of an answer: its tokens
LABEL = "label"  # of an answer, or of a token at a step's end
PLACE = "place"  # of an answer: its number among all, by which its steps' labels are found
USUAL = {"full": 1e-5, "lora": 1e-4}
STEPS = '{"prompt", "steps": [text, ...], "labels": [0 or 1, ...]}'
FORMS: dict[str, Rows] = {"pairwise": "pairs", "kwise": "ranked", "listwise": "ranked"}


@dataclass(frozen=True)
class Judgements:
    """groups: of examples that are compared; labels: of process rows, for each example of its steps; notes: for people;
    seq_len: the most tokens that an answer with its prompt has."""

    groups: list[list[Example]]
    seq_len: int
    notes: list[str]
    labels: list[list[int]] = field(default_factory=list)


class StepLabels:
    """A `BatchSource` of process rows: those of `source`, each with the labels of its steps as `tokens_of["label"]`."""

    def __init__(self, source: PackedExamples, labels: Sequence[Sequence[int]]) -> None:
        self.source, self._labels = source, labels
        self.rows_per_step, self.steps_per_epoch = source.rows_per_step, source.steps_per_epoch
        self.rows_per_epoch = source.rows_per_epoch

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> SequenceBatch:
        batch = self.source.batch(step, start, stop)
        assert isinstance(batch, SequenceBatch)
        places = batch.of_sequences(PLACE).long().tolist()
        labels = torch.tensor([float(label) for place in places for label in self._labels[place]])
        return batch.with_numbers(tokens={LABEL: batch.lay_trained(labels)})

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256(np.array([label for row in self._labels for label in row], dtype=np.int8).tobytes())
        return {**self.source.fingerprint(), "steps": digest.hexdigest()}


def reward_data(recipe: TrainRecipe, tokenizer: Tokenizer, positions: int | None, quiet: bool) -> Data:
    """The `Data` of kind reward."""
    objective = recipe.objective
    assert isinstance(objective, RewardObjective)
    found = read_judgements(objective, objective.files, tokenizer, objective.seq_len, positions, quiet=quiet)

    def pack(judged: Judgements, seed: int) -> BatchSource:
        width = judged.seq_len * max(map(len, judged.groups))  # holds any of the groups, and several short ones
        source = PackedExamples(
            judged.groups, seq_len=width, rows_per_step=recipe.train.batch_size, seed=seed, pad_id=tokenizer.pad_id,
            pack=objective.packing,
        )  # fmt: skip
        return StepLabels(source, judged.labels) if judged.labels else source

    source = pack(found, derive(recipe.seed, "data"))
    notes = [*found.notes, f"{len(found.groups):,} judgements, {source.steps_per_epoch:,} steps an epoch"]
    held_out = {}
    if objective.held_out:
        kept = read_judgements(objective, objective.held_out, tokenizer, found.seq_len, None, quiet=quiet)
        notes += [f"held out: {note}" for note in kept.notes]
        held_out["eval"] = pack(kept, 0)
    rate = USUAL["full" if recipe.adapter is None else "lora"]
    return Data(source, held_out, found.seq_len, 1.0, notes, rate)


def read_judgements(
    objective: RewardObjective,
    files: Sequence[Any],
    tokenizer: Tokenizer,
    seq_len: int | None,
    positions: int | None,
    *,
    quiet: bool = True,
) -> Judgements:
    """All rows of `files` in the objective's form. What is left out is told in the notes; what cannot be read is a
    `HanlinError` with file and row, or with `bad_rows: skip` told too."""
    if objective.form == "process":
        return _read_steps(objective, files, tokenizer, seq_len, positions)
    rows = FORMS.get(objective.form) or ("unpaired" if objective.target == "yes_no" else "scored")
    reading = read_preferences(files, rows, bad_rows=objective.bad_rows)
    groups, report = preference_examples(
        reading, tokenizer, seq_len=seq_len, max_positions=positions, overlong=objective.overlong, quiet=quiet
    )
    notes = report.lines()
    if objective.form in ("kwise", "listwise"):
        undecided = [g[0].name for g in groups if len({example.numbers["score"] for example in g}) == 1]
        groups = [g for g in groups if len({example.numbers["score"] for example in g}) > 1]
        if undecided:
            notes.append(f"{len(undecided):,} rows are left out, all their scores are equal: {undecided[0]} ...")
        if not groups:
            raise HanlinError(f"In all {len(undecided)} rows all scores are equal, so there is no order to learn.")
    if objective.margin and not any(example.numbers.get("margin") for group in groups for example in group):
        raise HanlinError("`objective.margin` is set, but no row has a `margin`. Give margins, or unset it.")
    return Judgements([_numbered(group) for group in groups], report.seq_len, notes)


def ended(example: Example) -> Example:
    """The example up to its last trained token: an answer with nothing behind its end."""
    last = max(place for place, trained in enumerate(example.trained) if trained) + 1
    return replace(example, ids=example.ids[:last], trained=example.trained[:last])


def step_ids(tokenizer: Tokenizer, steps: Sequence[str], separator: str) -> list[list[int]]:
    """The tokens of every step with what ends it. Each is encoded by itself, so that a step ends where a token does."""
    return [tokenizer.encode(step + separator) for step in steps]


def _numbered(group: list[Example]) -> list[Example]:
    """All with the same numbers: those of the file, where a group begins, how long an answer is."""
    numbers = [
        {"margin": 0.0} | dict(example.numbers) | {FIRST: float(not at), LENGTH: float(sum(example.trained))}
        for at, example in enumerate(group)
    ]
    return [replace(ended(example), numbers=own) for example, own in zip(group, numbers, strict=True)]


def _read_steps(
    objective: RewardObjective, files: Sequence[Any], tokenizer: Tokenizer, seq_len: int | None, positions: int | None
) -> Judgements:
    separator = objective.separator or SEPARATOR
    examples: list[Example] = []
    labels: list[list[int]] = []
    skipped: list[str] = []
    for file in files:
        before = len(examples)
        for number, row in read_rows(file):
            try:
                example, found = _step_row(row, f"{file}, row {number}", f"{file.name}:{number}", tokenizer, separator)
            except RowError as error:
                if objective.bad_rows == "stop":
                    raise RowError(f"{error} Mend the row, or set `objective.bad_rows: skip`.") from error
                skipped.append(str(error))
                continue
            examples.append(example)
            labels.append(found)
        if len(examples) == before:
            raise HanlinError(f"{file} holds no judged steps.{' The first: ' + skipped[-1] if skipped else ''}")
    longest = max(len(example.ids) for example in examples)
    seq_len = seq_len or covering_length([len(example.ids) for example in examples], positions)
    kept, cut, dropped = [], 0, 0
    for example, found in zip(examples, labels, strict=True):
        if len(example.ids) > seq_len:
            short = replace(example, ids=example.ids[:seq_len], trained=example.trained[:seq_len])
            if objective.overlong == "drop" or not any(short.trained):
                dropped += 1
                continue
            example, cut = ended(short), cut + 1
        kept.append((example, found[: sum(example.trained)]))
    if not kept:
        raise HanlinError(f"None of {len(examples)} rows fits {seq_len} tokens; the longest has {longest}.")
    counted = [label for _, found in kept for label in found]
    right = sum(counted) / len(counted)
    notes = [f"{len(kept):,} answers with {len(counted):,} steps, {right:.0%} of them right"]
    if cut or dropped:
        what = f"{dropped:,} are left out" if dropped else f"{cut:,} are cut"
        notes.append(f"{what}, longer than {seq_len} tokens (up to {longest:,})")
    if skipped:
        notes.append(f"{len(skipped):,} rows are skipped, the first: {skipped[0]}")
    groups = [
        [replace(example, numbers={FIRST: 1.0, LENGTH: float(len(found)), PLACE: float(place)})]
        for place, (example, found) in enumerate(kept)
    ]
    return Judgements(groups, seq_len, notes, [found for _, found in kept])


def _step_row(row: Any, where: str, name: str, tokenizer: Tokenizer, separator: str) -> tuple[Example, list[int]]:
    if not isinstance(row, Mapping) or not {"prompt", "steps", "labels"} <= row.keys():
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise RowError(f"{where} has {found}; expected {STEPS}.")
    steps, labels = row["steps"], row["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
        counts = [len(v) if isinstance(v, list) else type(v).__name__ for v in (steps, labels)]
        raise RowError(f"{where} has {counts[0]} `steps` and {counts[1]} `labels`; expected one or more, a label each.")
    for number, (step, label) in enumerate(zip(steps, labels, strict=True), start=1):
        if not isinstance(step, str) or not step.strip():
            raise RowError(f"{where}: step {number} is {str(step)[:60]!r}; expected a text.")
        if not isinstance(label, bool) and label not in (0, 1):
            raise RowError(f"{where}: the label of step {number} is {label!r}; expected 1 (right) or 0 (wrong).")
    turns = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
    talk = parse_row(
        {"messages": [*turns, {"role": "assistant", "content": separator.join(steps)}]}, "openai", where, name
    )
    ids = tokenizer.chat(talk.plain()[:-1])
    trained = [False] * len(ids)
    for step in step_ids(tokenizer, steps, separator):
        ids += step
        trained += [False] * (len(step) - 1) + [True]
    return Example(ids, trained, name), [int(label) for label in labels]
