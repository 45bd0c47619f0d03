"""`hanlin tokenizer` as it is typed."""

import io
import re
import sys

import pytest

from hanlin.cli import main
from hanlin.tokens import Tokenizer


def test_train_then_show(corpus, tmp_path, capsys):
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(corpus))
    out = tmp_path / "tokenizer"
    assert main(["tokenizer", "train", str(text), "--vocab-size", "800", "--out", str(out), "--special", "<|x|>"]) == 0
    assert "800 tokens, 9 of them special" in capsys.readouterr().out
    sentence = "Hello 你好\n\t42<|im_end|>"
    assert main(["tokenizer", "show", sentence, "--tokenizer", str(out)]) == 0
    shown = capsys.readouterr().out
    ids = [int(number) for number in re.findall(r" (\d+) (?:\||\n|$)", shown)]
    assert Tokenizer.load(out).decode(ids) == sentence
    assert f"{len(ids)} tokens" in shown


def test_show_reads_bytes_that_are_no_text_from_stdin(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ok \xff\xe4")))
    assert main(["tokenizer", "show", "-", "--tokenizer", str(folder)]) == 0
    assert "⟨FF⟩" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "a", "--tokenizer", "/nowhere/at/all"], "does not exist"),
        (["show", "", "--tokenizer", "FOLDER"], "empty"),
        (["train", "/nowhere.txt", "--vocab-size", "400", "--out", "OUT"], "/nowhere.txt does not exist"),
        (["train", "EMPTY", "--vocab-size", "400", "--out", "OUT"], "no text to train"),
        (["train", "BINARY", "--vocab-size", "400", "--out", "OUT"], "not UTF-8: byte 3 is 0xff"),
        (["train", "EMPTY", "--vocab-size", "many", "--out", "OUT"], "invalid int value"),
        (["train", "EMPTY", "--vocab-size", "400", "--out", "OUT", "--vocabsize", "3"], "(?i)unrecognized"),
        ([], "(?i)required"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_2(folder, tmp_path, capsys, words, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\xfe")
    names = {
        "FOLDER": folder,
        "OUT": tmp_path / "out",
        "EMPTY": tmp_path / "empty.txt",
        "BINARY": tmp_path / "binary.txt",
    }
    assert main(["tokenizer", *(str(names.get(word, word)) for word in words)]) == 2
    found = capsys.readouterr().err
    assert re.search(message, found), found
    assert "Traceback" not in found
    assert not (tmp_path / "out").exists()
