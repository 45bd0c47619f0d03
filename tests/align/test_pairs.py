"""Preference files of every spelling become the same pairs; only answers are trained; what cannot teach is counted."""

import json
from pathlib import Path

import pytest

from hanlin.align.pairs import preference_examples, read_preferences
from hanlin.core.errors import HanlinError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "preference"
ASKED = {"role": "user", "content": "Who are you?"}
GOOD, BAD = {"role": "assistant", "content": "A small model."}, {"role": "assistant", "content": "Four."}


def written(folder: Path, *rows, name: str = "pairs.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


SPELLINGS = [
    {"prompt": "Who are you?", "chosen": "A small model.", "rejected": "Four."},
    {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"prompt": "Who are you?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"instruction": "Who are you?", "input": "", "chosen": "A small model.", "rejected": "Four."},
    {
        "conversations": [{"from": "human", "value": "Who are you?"}],
        "chosen": {"from": "gpt", "value": "A small model."},
        "rejected": {"from": "gpt", "value": "Four."},
    },
    {
        "chosen": "\n\nHuman: Who are you?\n\nAssistant: A small model.",
        "rejected": "\n\nHuman: Who are you?\n\nAssistant: Four.",
    },
    {"prompt": "\n\nHuman: Who are you?\n\nAssistant:", "chosen": "A small model.", "rejected": "Four."},
]


@pytest.mark.parametrize("row", SPELLINGS)
def test_every_spelling_of_a_pair_gives_the_same_tokens(tmp_path, tokenizer, row):
    plain, _ = preference_examples(read_preferences([written(tmp_path, SPELLINGS[0])], "pairs"), tokenizer)
    found, _ = preference_examples(read_preferences([written(tmp_path, row)], "pairs"), tokenizer)
    assert [e.ids for e in found[0]] == [e.ids for e in plain[0]]
    assert [e.trained for e in found[0]] == [e.trained for e in plain[0]]
    for example, answer in zip(found[0], ("A small model.", "Four."), strict=True):
        learnt = [token for token, trained in zip(example.ids, example.trained, strict=True) if trained]
        assert tokenizer.decode(learnt) == answer and learnt[-1] in tokenizer.stop_ids


def test_only_the_last_answers_of_whole_conversations_are_trained(tmp_path, tokenizer):
    """The shared beginning of both conversations is the prompt, earlier answers included."""
    before = [{"role": "system", "content": "In one word."}, ASKED, GOOD, {"role": "user", "content": "Two plus two?"}]
    row = {"chosen": [*before, BAD], "rejected": [*before, {"role": "assistant", "content": "Five."}]}
    [(chosen, rejected)], report = preference_examples(read_preferences([written(tmp_path, row)], "pairs"), tokenizer)
    said = [tokenizer.decode([t for t, on in zip(e.ids, e.trained, strict=True) if on]) for e in (chosen, rejected)]
    assert said == ["Four.", "Five."]
    assert report.answers == 2 and report.trained == sum(chosen.trained) + sum(rejected.trained)


def test_unpaired_and_ranked_rows_carry_their_judgements(tmp_path, tokenizer):
    rows = [{"prompt": "Who?", "completion": "Me.", "label": True}, {"messages": [ASKED, BAD], "label": False}]
    groups, _ = preference_examples(read_preferences([written(tmp_path, *rows)], "unpaired"), tokenizer)
    assert [[e.numbers["label"] for e in group] for group in groups] == [[1.0], [0.0]]
    ranked = {"prompt": "Who?", "completions": ["Me.", "You.", "Four."], "scores": [0.5, 2, -1.0]}
    groups, _ = preference_examples(read_preferences([written(tmp_path, ranked)], "ranked"), tokenizer)
    assert [e.numbers["score"] for e in groups[0]] == [0.5, 2.0, -1.0]


def test_equal_answers_are_counted_and_left_out(tmp_path, tokenizer):
    same = {"prompt": "Who are you?", "chosen": "A model.", "rejected": "A model."}
    reading = read_preferences([written(tmp_path, same, SPELLINGS[0])], "pairs")
    groups, report = preference_examples(reading, tokenizer)
    assert len(groups) == 1 and report.equal == ["pairs.jsonl:1"]
    assert any("1 rows are left out, their answers are equal" in line for line in report.lines())
    with pytest.raises(HanlinError, match="equal answers"):
        read_preferences([written(tmp_path, same)], "pairs")


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_long_answers_are_dropped_or_cut_and_counted(tmp_path, tokenizer, overlong):
    long = {"prompt": "Who are you?", "chosen": "A model. " * 40, "rejected": "Four."}
    only_prompt = {"prompt": "Who are you? " * 40, "chosen": "A.", "rejected": "B."}
    reading = read_preferences([written(tmp_path, long, only_prompt, SPELLINGS[0])], "pairs")
    groups, report = preference_examples(reading, tokenizer, seq_len=64, overlong=overlong)
    assert all(len(e.ids) <= 64 and any(e.trained[1:]) for group in groups for e in group)
    if overlong == "drop":
        assert len(groups) == 1 and report.dropped == ["pairs.jsonl:1", "pairs.jsonl:2"] and not report.cut
    else:
        assert len(groups) == 2 and report.cut == ["pairs.jsonl:1"] and report.dropped == ["pairs.jsonl:2"]


BROKEN = [
    ("pairs", {"prompt": "Q", "chosen": "A"}, "no `rejected`"),
    ("pairs", {"chosen": "A", "rejected": "B"}, "has no prompt"),
    (
        "pairs",
        {"prompt": "Q", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        "do not begin with the row's `prompt`",
    ),
    ("pairs", {"chosen": [ASKED, GOOD], "rejected": [{"role": "user", "content": "Else?"}, BAD]}, "prompt in common"),
    ("pairs", {"prompt": "Q", "chosen": "A", "rejected": 3}, "expected a text or a list of turns"),
    ("pairs", {"prompt": "Q", "chosen": "A", "rejected": ""}, "empty"),
    ("pairs", {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "much"}, "finite number"),
    ("pairs", ["Q", "A", "B"], "no JSON object"),
    ("unpaired", {"prompt": "Q", "completion": "A", "label": "good"}, "expected true"),
    ("unpaired", {"messages": [ASKED], "label": True}, "no `completion`"),
    ("ranked", {"prompt": "Q", "completions": ["A", "B"], "scores": [1.0]}, "2 `completions` and 1 `scores`"),
    ("ranked", {"prompt": "Q", "completions": ["A"], "scores": [1.0]}, "two or more"),
    ("ranked", {"prompt": "Q", "completions": ["A", "B"], "scores": [1.0, None]}, "finite number"),
]


@pytest.mark.parametrize(("form", "row", "said"), BROKEN)
def test_a_row_that_cannot_be_read_is_named_or_skipped(tmp_path, form, row, said):
    good = {
        "pairs": SPELLINGS[0],
        "unpaired": {"prompt": "Q", "completion": "A", "label": 1},
        "ranked": {"prompt": "Q", "completions": ["A", "B"], "scores": [1, 2]},
    }[form]
    file = written(tmp_path, good, row)
    with pytest.raises(HanlinError, match=said) as caught:
        read_preferences([file], form)
    assert f"{file}, row 2" in str(caught.value)
    reading = read_preferences([file], form, bad_rows="skip")
    assert len(reading.rows) == 1 and len(reading.skipped) == 1
    with pytest.raises(HanlinError, match="holds no preference"):
        read_preferences([written(tmp_path, row, name="bad.jsonl")], form, bad_rows="skip")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared preference files are not here")
@pytest.mark.parametrize(
    ("name", "form"), [("dpo_en_demo", "pairs"), ("dpo_zh_demo", "pairs"), ("kto_en_demo", "unpaired")]
)
def test_real_files_are_read_whole(name, form):
    reading = read_preferences([SHARED / f"{name}.json"], form)
    assert len(reading.rows) == 300 and not reading.equal
