"""One tokenizer for this room's tests: byte-level BPE of 400 tokens, trained on a few lines of English and Chinese."""

from pathlib import Path

import pytest

from hanlin.tokens import Tokenizer

LINES = [
    "What is two plus two? Two plus two is four. Who are you? I am a small model.",
    "二加二等于几？二加二等于四。你是谁？我是一个小小的语言模型。谢谢！不客气。",
    "You answer in one word. 你只用一个词回答。 def add(a, b): return a + b  # 12345",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "lines.txt").write_text("\n".join(LINES * 20), encoding="utf-8")
    Tokenizer.train([folder / "lines.txt"], vocab_size=400).save(folder / "tokenizer")
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)
