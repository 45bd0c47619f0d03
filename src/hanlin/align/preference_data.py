"""Preference files → packed rows, for every method that learns from compared answers: DPO's family, KTO, RRHF.

A row holds the answers to one prompt side by side (a pair: chosen, rejected), and several prompts where they fit.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from hanlin.align.method import Data
from hanlin.align.pairs import (
    Answers,
    Form,
    PreferenceReading,
    PreferenceReport,
    preference_examples,
    read_preferences,
)
from hanlin.align.preference_recipe import KtoObjective, PreferenceData, PreferenceObjective, RrhfObjective
from hanlin.align.rahf_recipe import RahfObjective
from hanlin.align.recipe import NewModel, TrainRecipe
from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive
from hanlin.data.examples import Example
from hanlin.data.packing import PackedExamples
from hanlin.models import load_config
from hanlin.tokens import Tokenizer

FIRST = "first"  # of an answer: 1 where a prompt's answers begin
ROW = "row"  # of an answer: the place of its row among those that were read
FASTER = {"orpo": 3.0, "rrhf": 2.0}  # kinds that are half a fine-tuning take a higher rate


def preference_data(recipe: TrainRecipe, tokenizer: Tokenizer, positions: int | None, quiet: bool) -> Data:
    """The `Data` of kinds dpo … orpo, kto and rrhf: groups of examples with `margin`, `label` or `score` and `first`.
    more, by "data" and "eval": for KTO prompts with answers that belong to other prompts, for RAHF the rows."""
    objective = recipe.objective
    assert isinstance(objective, PreferenceData)
    form = FORMS[type(objective)]
    encode = partial(preference_examples, tokenizer=tokenizer, overlong=objective.overlong, quiet=quiet)
    reading = _numbered(read_preferences(objective.files, form, bad_rows=objective.bad_rows))
    groups, report = encode(reading, seq_len=objective.seq_len, max_positions=positions)
    notes = [*report.lines(), *_about(objective, reading)]

    def pack(groups: Sequence[Sequence[Example]], seed: int) -> PackedExamples:
        marked = [
            [
                replace(e, name=_named(form, e, at), numbers={**e.numbers, FIRST: float(not at)})
                for at, e in enumerate(group)
            ]
            for group in groups
        ]
        return PackedExamples(
            marked, seq_len=report.seq_len * max(map(len, groups)), rows_per_step=recipe.train.batch_size, seed=seed,
            pad_id=tokenizer.pad_id, pack=objective.packing,
        )  # fmt: skip

    source = pack(groups, derive(recipe.seed, "data"))
    notes.append(
        f"{source.rows_per_epoch:,} rows of {source.seq_len} tokens, {source.density:.0%} of their places filled"
    )
    held_out, others = {}, {}
    if isinstance(objective, KtoObjective):
        others["data"] = _mismatched(reading, tokenizer, report, pack, derive(recipe.seed, "mismatched"))
    if isinstance(objective, RahfObjective):
        others["data"] = reading.rows
    if objective.held_out:
        kept = _numbered(read_preferences(objective.held_out, form, bad_rows=objective.bad_rows))
        kept_groups, kept_report = encode(kept, seq_len=report.seq_len)
        notes += [f"held out: {line}" for line in kept_report.lines()]
        held_out["eval"] = pack(kept_groups, 0)
        if isinstance(objective, KtoObjective):
            others["eval"] = _mismatched(kept, tokenizer, report, pack, 0)
        if isinstance(objective, RahfObjective):
            others["eval"] = kept.rows
    size = None if isinstance(recipe.model, NewModel) else load_config(recipe.model.path).parameters().total
    rate = usual_rate(objective.kind, size, adapter=recipe.adapter is not None)
    return Data(source, held_out, report.seq_len, EPOCHS.get(objective.kind, 1.0), notes, rate, others)


def usual_rate(kind: str, parameters: int | None, *, adapter: bool) -> float:
    """1e-4 for a million parameters, falling with the root of their number (7 billion: 1.2e-6); more for the kinds in
    `FASTER`; ten times that for an adapter, at most 1e-3. Tried at 0.3 million (`benchmarks/bench_preferences.py`): at
    3e-4 DPO makes both answers of a pair so much less likely that other texts win."""
    shrunk = min(1.0, (1e6 / parameters) ** 0.5) if parameters else 1.0
    rate = 1e-4 * shrunk * FASTER.get(kind, 1.0)
    return float(f"{min(10 * rate, 1e-3) if adapter else rate:.2g}")


def _numbered(reading: PreferenceReading) -> PreferenceReading:
    """Every answer carries the place of its row."""
    rows = [
        replace(row, numbers=tuple({**numbers, ROW: float(place)} for numbers in row.numbers))
        for place, row in enumerate(reading.rows)
    ]
    return replace(reading, rows=rows)


def _named(form: Form, example: Example, place: int) -> str:
    """Of an answer, for people: pairs.jsonl:17 (chosen)."""
    if form == "pairs":
        return f"{example.name} ({'rejected' if place else 'chosen'})"
    if form == "ranked":
        return f"{example.name} (score {example.numbers['score']:g})"
    return f"{example.name} ({'good' if example.numbers.get('label') else 'bad'})"


def _about(objective: PreferenceData, reading: PreferenceReading) -> list[str]:
    """What people should know about these data and this objective."""
    if isinstance(objective, PreferenceObjective):
        margins = any(row.numbers[0]["margin"] for row in reading.rows)
        if objective.margin and not margins:
            raise HanlinError("`objective.margin` is set, but no row has a `margin`. Give margins, or unset it.")
        return (
            ["the rows' `margin` is left aside; `objective.margin: true` uses it"]
            if margins and not objective.margin
            else []
        )
    if isinstance(objective, KtoObjective):
        labels = [row.numbers[0]["label"] for row in reading.rows]
        good, bad = sum(labels), len(labels) - sum(labels)
        if not good * objective.good_weight or not bad * objective.bad_weight:
            return [f"{good:.0f} answers are good and {bad:.0f} are bad: KTO learns best from both"]
        ratio = good * objective.good_weight / (bad * objective.bad_weight)
        line = f"{good:.0f} good and {bad:.0f} bad answers, weighed {ratio:.2f} to 1"
        return [
            line if 1 <= ratio <= 4 / 3 else f"{line}; the paper keeps that between 1 and 4/3 (good_weight, bad_weight)"
        ]
    return []


def _mismatched(
    reading: PreferenceReading, tokenizer: Tokenizer, report: PreferenceReport, pack, seed: int
) -> PackedExamples:
    """Each prompt with the answer of the next one: what the policy says to answers that nobody gave there."""
    rows = reading.rows
    talks = []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        (asked, _), (_, answer) = _halves(row), _halves(other)
        talks.append(Answers((replace(row.conversations[0], messages=(*asked, *answer)),), ({},), row.name))
    found = PreferenceReading(talks, [], [])
    groups, _ = preference_examples(found, tokenizer, seq_len=report.seq_len, overlong="cut")
    return pack(groups, seed)


def _halves(row: Answers) -> tuple[tuple, tuple]:
    """The messages of the prompt, which are only read, and of the answer."""
    messages = row.conversations[0].messages
    first = next(at for at, message in enumerate(messages) if message.trained)
    return messages[:first], messages[first:]


FORMS: dict[type, Form] = {
    PreferenceObjective: "pairs",
    KtoObjective: "unpaired",
    RrhfObjective: "ranked",
    RahfObjective: "pairs",
}
EPOCHS = {"rrhf": 3.0}
