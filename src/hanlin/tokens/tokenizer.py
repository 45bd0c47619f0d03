"""`Tokenizer`: text to ids and back, saved as the files that transformers, vLLM and llama.cpp read.

The engine inside is the `tokenizers` library; ours are the pre-tokenisation, the special tokens, the chat template, and
the guarantees: any bytes survive a round trip, and text from outside never becomes a special token.
"""

import hashlib
import json
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers

from hanlin.core.errors import HanlinError
from hanlin.core.text_sources import read_texts
from hanlin.tokens.chat import ChatEncoder
from hanlin.tokens.chat_template import CHATML
from hanlin.tokens.folder import TokenizerFiles, read_folder, write_folder
from hanlin.tokens.spelling import Spell, speller
from hanlin.tokens.training import END_OF_TEXT, PAD, train_bpe

NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # how Python's "surrogateescape" carries bytes that are no text


@dataclass(frozen=True)
class ChatIds:
    """A conversation as tokens. trained[i]: token i is the assistant's (its words and its end token). turns: the
    [start, stop) of each of its turns."""

    ids: list[int]
    trained: list[bool]
    turns: tuple[tuple[int, int], ...] = ()


class Tokenizer:
    """Make one with `Tokenizer.train(...)` or `Tokenizer.load(folder)`.

    It is a value: nothing changes it, threads may share it, and it may be pickled.
    """

    def __init__(self, files: TokenizerFiles, *, where: str = "tokenizer.json") -> None:
        """From the contents of a tokenizer's files; where: their name in errors."""
        self._files, self._where = files, where
        self._literal = files.engine(where)
        self._literal.encode_special_tokens = True
        for role, text in files.special.items():
            if self._literal.token_to_id(text) is None:
                raise HanlinError(f"{where} has no token {text!r}, which tokenizer_config.json names as `{role}`.")

    @classmethod
    def train(
        cls,
        files: Iterable[str | os.PathLike[str]],
        *,
        vocab_size: int,
        special: Sequence[str] = (),
        field: str = "text",
        quiet: bool = True,
    ) -> "Tokenizer":
        """Train byte-level BPE on files and folders, streamed (txt, jsonl, parquet, gz, zst: `core.text_sources`).

        special: more special tokens than the usual ones. field: where the text stands in a row of jsonl or parquet.
        """
        texts = read_texts(files, field=field)
        return cls.train_from_iterator(texts, vocab_size=vocab_size, special=special, quiet=quiet)

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], *, vocab_size: int, special: Sequence[str] = (), quiet: bool = True
    ) -> "Tokenizer":
        """Train byte-level BPE on texts; they are read once."""
        engine = train_bpe(texts, vocab_size=vocab_size, special=special, quiet=quiet)
        roles = {"eos_token": END_OF_TEXT, "pad_token": PAD}
        return cls(TokenizerFiles(engine.to_str(pretty=True), roles, CHATML))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """From a folder with `tokenizer.json` (and `tokenizer_config.json`, `chat_template.jinja`), whoever made it."""
        return cls(read_folder(path), where=os.fspath(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into a folder; `transformers.AutoTokenizer.from_pretrained` reads them."""
        write_folder(path, self._files)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """special: whether special tokens written in the text become their ids (never for untrusted text)."""
        return _encode(self._plain if special else self._literal, text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        try:
            encodings = self._literal.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            return [self.encode(text) for text in texts]  # finds the one that is at fault
        return [encoding.ids for encoding in encodings]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Any bytes, UTF-8 or not: `decode_bytes` gives exactly them back (unless the tokenizer normalises text)."""
        ids: list[int] = []
        for piece in NOT_UTF8.split(data.decode("utf-8", errors="surrogateescape")):
            if NOT_UTF8.fullmatch(piece):
                ids += [self._byte_ids[byte] for byte in piece.encode("utf-8", errors="surrogateescape")]
            elif piece:
                ids += self.encode(piece)
        return ids

    def prompt(self, text: str) -> list[int]:
        """A text to continue, as the model was trained to see one: with a beginning token if the tokenizer adds one."""
        return _encode(self._literal, text, add=True)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 (a character cut in half) become U+FFFD."""
        return self._literal.decode(list(ids), skip_special_tokens=skip_special)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, one token after the other; a special token gives its own spelling."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; a special token gives its own spelling.

        An id that no token has gives nothing: models round their vocabulary up. Raises `HanlinError` for a tokenizer
        that is neither byte-level nor SentencePiece.
        """
        spelling = self._literal.id_to_token(token) if token >= 0 else None
        if spelling is None:
            return b""
        return spelling.encode() if token in self._added else self._spell(spelling)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = True, **variables: Any) -> list[int]:
        """Messages through the chat template; generate: end with the opening of the assistant's turn.

        variables: what else the template reads (`tools`, `enable_thinking`). What is written in the messages and there
        never becomes a special token.
        """
        return self._chat.ids(messages, generate=generate, **variables)

    def chat_trained(
        self, messages: Sequence[Mapping[str, Any]], *, answers: Container[int] | None = None, **variables: Any
    ) -> ChatIds:
        """A whole conversation with the assistant's tokens marked; a template that rewrites them later is refused.

        answers: the numbers of the assistant's messages that are wanted; None: all. variables: as in `chat`.
        """
        ids, turns = self._chat.trained(messages, answers=answers, **variables)
        trained = [False] * len(ids)
        for start, stop in turns:
            trained[start:stop] = [True] * (stop - start)
        return ChatIds(ids, trained, tuple(turns))

    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = False, **variables: Any) -> str:
        """What the template writes, for those who ask what it can write; a prompt is `chat`."""
        return self._chat.text(messages, generate=generate, **variables)

    @property
    def where(self) -> str:
        """Its folder, for errors."""
        return self._where

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._files.chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The template itself (Jinja), for those who ask which variables it reads."""
        return self._files.chat_template

    @cached_property
    def size(self) -> int:
        """Number of ids, special tokens included."""
        return max(self._literal.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special(self) -> Mapping[str, int]:
        """Every special token's spelling and id."""
        return {
            token.content: number
            for number, token in sorted(self._literal.get_added_tokens_decoder().items())
            if token.special
        }

    @cached_property
    def eos_id(self) -> int:
        """End of a document."""
        if "eos_token" in self._files.special:
            return self._id("eos_token")
        if self._files.end_ids:
            return self._files.end_ids[0]
        raise HanlinError(
            f"{self._where} does not say which token ends a document. Name it as `eos_token` in tokenizer_config.json; "
            f"the special tokens are {', '.join(self.special) or 'none'}."
        )

    @cached_property
    def pad_id(self) -> int:
        """Fills rows; the end of a document where the tokenizer has no token of its own for it."""
        return self._id("pad_token") if "pad_token" in self._files.special else self.eos_id

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which generation ends: end of document and end of turn."""
        return tuple(dict.fromkeys([self.eos_id, *self._files.end_ids, *self._end_of_turn]))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of vocabulary, merges and pre-tokenisation: shards written with another tokenizer are refused by it."""
        parts = json.loads(self._literal.to_str())
        wanted = {name: parts.get(name) for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        return hashlib.sha256(json.dumps(wanted, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def _id(self, role: str) -> int:
        number = self._literal.token_to_id(self._files.special[role])
        assert number is not None  # checked when it was made
        return number

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._files, self._where)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same engine with special tokens switched on: another object, so that threads cannot disturb it."""
        return self._files.engine(self._where)

    @cached_property
    def _chat(self) -> ChatEncoder:
        if self._files.chat_template is None:
            raise HanlinError(
                f"{self._where} has no chat template, so it does not say how a conversation is written. Put one into "
                "chat_template.jinja, or give the model a plain prompt."
            )
        return ChatEncoder(self._plain, self._literal, self._files.chat_template, self._files.special)

    @cached_property
    def _end_of_turn(self) -> list[int]:
        """The special token that the template writes after an assistant's words."""
        if not self.has_chat:
            return []
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids, [(start, stop)] = self._chat.trained(probe)
        except HanlinError:  # a template for other conversations; its stop tokens stand in generation_config.json
            return []
        last = ids[start:stop][-1:]
        return [token for token in last if token in self.special.values()]

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._literal.get_added_tokens_decoder())

    @cached_property
    def _spell(self) -> Spell:
        return speller(self._literal, self._where)

    @cached_property
    def _byte_ids(self) -> list[int]:
        vocabulary = self._literal.get_vocab(with_added_tokens=False)
        found: dict[bytes, int] = {}
        for spelling, number in vocabulary.items():
            if len(spelling) == 1 or spelling.startswith("<0x"):
                found.setdefault(self._spell(spelling), number)
        missing = [byte for byte in range(256) if bytes([byte]) not in found]
        if missing:
            raise HanlinError(
                f"{self._where} has no token for the byte 0x{missing[0]:02x} (and {len(missing) - 1} others), so it "
                "cannot spell bytes that are no text. `hanlin tokenizer train` makes one that can."
            )
        return [found[bytes([byte])] for byte in range(256)]


def _encode(engine: tokenizers.Tokenizer, text: str, *, add: bool = False) -> list[int]:
    try:
        return engine.encode(text, add_special_tokens=add).ids
    except TypeError:
        if not isinstance(text, str):
            raise
        place = next((at for at, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
        if place is None:
            raise
        raise HanlinError(
            f"The text holds half a character (the lone surrogate U+{ord(text[place]):04X}) at character {place}; no "
            "encoding of text can hold it. Mend the text, or encode its bytes with `encode_bytes`."
        ) from None


def _rebuilt(files: TokenizerFiles, where: str) -> Tokenizer:
    return Tokenizer(files, where=where)
