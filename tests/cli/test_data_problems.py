"""`hanlin data problems`: files that training reads, a word where there are no more problems, and what is refused."""

import json
import re

import pytest

from hanlin.cli import main


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_problems_are_written_and_counted(tmp_path, capsys):
    flags = "--kind chain --terms 4 --train 40 --held-out 10 --largest 30 --worked 20 --answered 5 --seed 3"
    assert main(["data", "problems", "--out", str(tmp_path / "made"), *flags.split()]) == 0
    printed = dict(re.findall(r"made/(\S+): (\d+)", capsys.readouterr().out))
    assert printed == {"train.jsonl": "40", "held-out.jsonl": "10", "worked.jsonl": "20", "answered.jsonl": "5"}
    train, answered = rows(tmp_path / "made" / "train.jsonl"), rows(tmp_path / "made" / "answered.jsonl")
    assert all(len(re.findall(r"\d+", row["prompt"])) == 4 for row in train)
    for row, chat in zip(train, answered, strict=False):
        assert [turn["content"] for turn in chat["messages"]] == [row["prompt"], row["answer"]]


def test_it_says_so_when_there_are_no_more_problems(tmp_path, capsys):
    assert main(["data", "problems", "--out", str(tmp_path), "--largest", "5", "--held-out", "5"]) == 0
    assert "no more different problems for train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kind", "product"], "'product'"),
        (["--train", "0"], "--train 0"),
        (["--train", "10", "--worked", "11"], "--worked"),
        (["--largest", "1"], "largest is 1"),
    ],
)
def test_what_cannot_be_made_is_refused_in_words(tmp_path, capsys, flags, said):
    assert main(["data", "problems", "--out", str(tmp_path), *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_help_has_examples_that_run(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as left:
        main(["data", "problems", "--help"])
    assert left.value.code == 0
    examples = re.findall(r"hanlin (data problems --out .+)", capsys.readouterr().out)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    for line in examples:
        assert main([*line.split(), "--train", "30", "--held-out", "5", "--worked", "3"]) == 0
