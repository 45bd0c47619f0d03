"""`Tokenizer`: text to ids and back, saved as the files that transformers, vLLM and llama.cpp read.

The engine inside is the `tokenizers` library; ours are the pre-tokenisation, the special tokens, the chat template, and
the guarantee that any bytes survive a round trip.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ChatIds:
    """A conversation as tokens. trained[i]: token i is the assistant's (its words and its end token)."""

    ids: list[int]
    trained: list[bool]


class Tokenizer:
    """Make one with `Tokenizer.train(...)` or `Tokenizer.load(folder)`."""

    @classmethod
    def train(cls, files: Iterable[str | os.PathLike[str]], *, vocab_size: int) -> "Tokenizer":
        """Train byte-level BPE on files (txt, jsonl, parquet, gz, zst), streamed."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """From a folder with `tokenizer.json` (and `tokenizer_config.json`, `chat_template.jinja`)."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        raise NotImplementedError

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """special: whether special tokens written in the text become their ids (never for untrusted text)."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; a special token gives its own spelling."""
        raise NotImplementedError

    def chat(self, messages: Sequence[dict[str, Any]], *, generate: bool = True) -> list[int]:
        """Messages through the chat template; generate: end with the opening of the assistant's turn."""
        raise NotImplementedError

    def chat_trained(self, messages: Sequence[dict[str, Any]]) -> ChatIds:
        """A whole conversation with the assistant's tokens marked."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Number of ids, special tokens included."""
        raise NotImplementedError

    @property
    def eos_id(self) -> int:
        """End of a document."""
        raise NotImplementedError

    @property
    def pad_id(self) -> int:
        raise NotImplementedError

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which generation ends: end of document and end of turn."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Hash of vocabulary, merges and pre-tokenisation: shards written with another tokenizer are refused by it."""
        raise NotImplementedError
