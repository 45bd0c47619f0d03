"""A small tokenizer and small corpora in English and Chinese."""

import random
from pathlib import Path

import pytest

from hanlin.core.text_sources import Document
from hanlin.tokens import Tokenizer

WORDS = [
    "the",
    "model",
    "reads",
    "text",
    "and",
    "writes",
    "翰林",
    "读书",
    "写字",
    "语言",
    "模型",
    "numbers",
    "1",
    "2",
    "3",
]


def make_documents(count: int, *, seed: int = 0, longest: int = 60) -> list[Document]:
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for _ in range(count)]
    return [Document(f"文/{seed}:{number}", text) for number, text in enumerate(texts)]


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return make_documents(120)


@pytest.fixture(scope="session")
def tokenizer(documents: list[Document]) -> Tokenizer:
    return Tokenizer.train_from_iterator([document.text for document in documents], vocab_size=330)


@pytest.fixture(scope="session")
def other_tokenizer(documents: list[Document]) -> Tokenizer:
    return Tokenizer.train_from_iterator([document.text for document in documents], vocab_size=300)


@pytest.fixture
def shards(documents, tokenizer, tmp_path: Path):
    from hanlin.data.build import build_shards

    return build_shards(documents, tokenizer, tmp_path / "shards", shard_bytes=4000)


@pytest.fixture(scope="session")
def all_files():
    def read(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    return read
