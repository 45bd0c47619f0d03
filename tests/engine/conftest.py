"""A real byte-level tokenizer of a few hundred tokens, a random tiny model, an engine over both."""

import pytest
from tests.engine.tiny import make_model

from hanlin.engine import Engine
from hanlin.models.transformer import Transformer
from hanlin.tokens import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过懒狗。世界你好！ def f(x): return x + 1\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator([TEXT * 20] * 5, vocab_size=330)


@pytest.fixture(scope="session")
def model(tokenizer) -> Transformer:
    return make_model(tokenizer)


@pytest.fixture
def engine(model, tokenizer):
    with Engine(model, tokenizer, max_batch=4) as engine:
        yield engine
