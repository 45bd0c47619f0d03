"""Where words and sentences begin, read off the bytes of the tokens: no text is decoded while batches are made.

English: a token continues the word before it if it begins with a letter or digit and the other ended with one
("read" "ing"; " ing" is a word of its own). Chinese, Japanese: every token is a word, except the second half of a
character that was cut in two. A sentence ends with 。！？…!? or a line, and with a full stop before a space.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hanlin.tokens import Tokenizer

MARKS = "。|！|？|…|[!?\\n]"
CLOSERS = "[\"')\\]]|’|”|»|」|』|）|》"  # what closes a quotation belongs to it
SENTENCE_END = re.compile(rf"(?:(?:{MARKS})+|\.+(?:{CLOSERS})*(?=\s|\Z))(?:{CLOSERS})*\n*".encode())
UNSPACED = ((0x2E80, 0x3100), (0x31F0, 0xA4D0), (0xF900, 0xFB00), (0x20000, 0x40000))  # Han, kana: no spaces in text


def spellings(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """The bytes of every id of a byte-level or SentencePiece tokenizer."""
    return tuple(tokenizer.token_bytes(token) for token in range(tokenizer.size))


@dataclass(frozen=True, eq=False)
class WordTable:
    """For each id: it begins with a letter or digit of a spaced script; it ends with one; it never begins a word."""

    begins: np.ndarray
    ends: np.ndarray
    inside: np.ndarray

    @classmethod
    def of(cls, spelt: Sequence[bytes]) -> "WordTable":
        """From the bytes of every id (`spellings`)."""
        texts = [piece.decode(errors="replace") for piece in spelt]
        return cls(
            np.array([_spaced_letter(text[:1]) for text in texts]),
            np.array([_spaced_letter(text[-1:]) for text in texts]),
            np.array([bool(piece) and 0x80 <= piece[0] < 0xC0 for piece in spelt]),  # a later byte of a character
        )

    @classmethod
    def of_wordpieces(cls, pieces: Sequence[str]) -> "WordTable":
        """From a WordPiece vocabulary, which marks what continues a word by ##."""
        never = np.zeros(len(pieces), dtype=bool)
        return cls(never, never, np.array([piece.startswith("##") for piece in pieces]))

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """ids (n,) -> (n,) int64: the number of each token's word, from 0."""
        continues = self.inside[ids]
        continues[1:] |= self.ends[ids[:-1]] & self.begins[ids[1:]]
        continues[:1] = False
        return np.cumsum(~continues) - 1


@dataclass(frozen=True, eq=False)
class SentenceTable:
    """spelt: the bytes of each id (`spellings`); a mark may be spread over several tokens, so bytes are searched."""

    spelt: tuple[bytes, ...]

    def split(self, ids: np.ndarray) -> list[np.ndarray]:
        """ids (n,) in sentences, none empty; together they are `ids`. A token that holds an end and more belongs to
        what it ends."""
        pieces = [self.spelt[token] for token in ids.tolist()]
        ends = np.cumsum([len(piece) for piece in pieces])
        marks = [match.end() for match in SENTENCE_END.finditer(b"".join(pieces))]
        return [part for part in np.split(ids, np.searchsorted(ends, marks) + 1) if len(part)]


def _spaced_letter(character: str) -> bool:
    return character.isalnum() and not any(low <= ord(character) < high for low, high in UNSPACED)
