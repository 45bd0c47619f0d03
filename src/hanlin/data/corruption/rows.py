"""A row maker turns one piece of a document into one row of a method's batch: markers, noise, targets, padding.

    piece of a document  ──▶  MaskedRows · PairRows · PrefixRows · SpanRows · DenoisingRows · PermutationRows  ──▶  row

Makers are values: all settings of a method, and nothing else. Every row of one maker has the same shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from hanlin.core.errors import HanlinError
from hanlin.data.corruption.batches import (
    CorruptedBatch,
    MaskedBatch,
    PermutationBatch,
    PrefixBatch,
    Seq2SeqBatch,
)
from hanlin.data.corruption.boundaries import SentenceTable, WordTable
from hanlin.data.corruption.denoising import Noise
from hanlin.data.corruption.masked_lm import choose_tokens, mask_tokens
from hanlin.data.corruption.permutation_lm import choose_last, choose_spans, count_predicted, draw_order
from hanlin.data.corruption.prefix_lm import draw_prefix, prefix_targets
from hanlin.data.corruption.sentence_pairs import Elsewhere, draw_pair, join_pair
from hanlin.data.corruption.span_corruption import corrupt_spans, corrupted_lengths, draw_spans, longest_text
from hanlin.nn.losses import IGNORE

Row = Mapping[str, np.ndarray]  # fields of the batch, without `positions`; one row of each


@dataclass(frozen=True)
class Piece:
    """ids (n,) int64: consecutive tokens of one document, `least` <= n <= `window` of the maker; last: the document
    ends with them. elsewhere: tokens of another document."""

    ids: np.ndarray
    last: bool
    elsewhere: Elsewhere


class RowMaker(Protocol):
    """window: most tokens of a document in a row; least: shorter documents are left out; batch: what rows become;
    needs_elsewhere: whether it asks for tokens of other documents."""

    batch: ClassVar[type[CorruptedBatch]]
    least: ClassVar[int]
    needs_elsewhere: ClassVar[bool]

    @property
    def window(self) -> int: ...

    def row(self, piece: Piece, chance: np.random.Generator) -> Row:
        """A function of the piece and of what `chance` gives."""
        ...


@dataclass(frozen=True, eq=False)
class MaskedRows:
    """[CLS] text [SEP], masked; RoBERTa's rows (arXiv:1907.11692). words: mask whole words. replacements: ids from
    which the random 10 % are drawn (all but the special ones)."""

    seq_len: int
    cls_id: int
    sep_id: int
    mask_id: int
    pad_id: int
    replacements: np.ndarray
    rate: float = 0.15
    words: WordTable | None = None

    batch: ClassVar[type[CorruptedBatch]] = MaskedBatch
    least: ClassVar[int] = 1
    needs_elsewhere: ClassVar[bool] = False

    @property
    def window(self) -> int:
        return self.seq_len - 2

    def row(self, piece: Piece, chance: np.random.Generator) -> Row:
        ids = np.concatenate([[self.cls_id], piece.ids, [self.sep_id]]).astype(np.int64)
        text = np.ones(len(ids), dtype=bool)
        text[[0, -1]] = False
        return _masked_row(self, ids, text, chance)


@dataclass(frozen=True, eq=False)
class PairRows(MaskedRows):
    """[CLS] first [SEP] second [SEP], masked, with next-sentence labels; BERT's rows."""

    sentences: SentenceTable = field(kw_only=True)

    least: ClassVar[int] = 2
    needs_elsewhere: ClassVar[bool] = True

    @property
    def window(self) -> int:
        return self.seq_len - 3

    def row(self, piece: Piece, chance: np.random.Generator) -> Row:
        pair = draw_pair(self.sentences.split(piece.ids), piece.elsewhere, chance)
        ids, segments, text = join_pair(pair, cls_id=self.cls_id, sep_id=self.sep_id)
        row = _masked_row(self, ids, text, chance)
        return {**row, "segments": _padded(segments, self.seq_len, 0), "next_sentence": np.array(pair.label)}


@dataclass(frozen=True)
class PrefixRows:
    """text with a prefix; end_id closes the last row of a document."""

    seq_len: int
    end_id: int
    pad_id: int

    batch: ClassVar[type[CorruptedBatch]] = PrefixBatch
    least: ClassVar[int] = 2
    needs_elsewhere: ClassVar[bool] = False

    @property
    def window(self) -> int:
        return self.seq_len - 1

    def row(self, piece: Piece, chance: np.random.Generator) -> Row:
        ids = np.append(piece.ids, self.end_id) if piece.last else piece.ids
        prefix = draw_prefix(len(ids), chance)
        return {
            "ids": _padded(ids, self.seq_len, self.pad_id),
            "targets": _padded(prefix_targets(ids, prefix), self.seq_len, IGNORE),
            "documents": _padded(np.zeros_like(ids), self.seq_len, -1),
            "prefix": np.array(prefix),
        }


@dataclass(frozen=True)
class SpanRows:
    """T5's rows: source and target each closed by end_id; the decoder begins with start_id (T5: the padding token)."""

    source_len: int
    end_id: int
    start_id: int
    pad_id: int
    sentinels: tuple[int, ...]
    density: float = 0.15
    mean: float = 3.0
    closing: bool = True

    batch: ClassVar[type[CorruptedBatch]] = Seq2SeqBatch
    least: ClassVar[int] = 2
    needs_elsewhere: ClassVar[bool] = False

    @property
    def window(self) -> int:
        return longest_text(self.source_len - 1, density=self.density, mean=self.mean)

    @property
    def target_len(self) -> int:
        lengths = corrupted_lengths(self.window, density=self.density, mean=self.mean, closing=self.closing)
        return lengths[1] + 1

    def row(self, piece: Piece, chance: np.random.Generator) -> Row:
        spans = draw_spans(len(piece.ids), chance, density=self.density, mean=self.mean)
        source, target = corrupt_spans(piece.ids, spans, self.sentinels, closing=self.closing)
        source, target = np.append(source, self.end_id), np.append(target, self.end_id)
        return _seq2seq_row(source, target, self.start_id, self.pad_id, self.source_len, self.target_len)


@dataclass(frozen=True, eq=False)
class DenoisingRows:
    """BART's rows: begin_id document end_id on both sides; the decoder begins with start_id (BART: the end token)."""

    seq_len: int
    begin_id: int
    end_id: int
    start_id: int
    mask_id: int
    pad_id: int
    sentences: SentenceTable
    noise: Noise = field(default_factory=Noise)

    batch: ClassVar[type[CorruptedBatch]] = Seq2SeqBatch
    least: ClassVar[int] = 1
    needs_elsewhere: ClassVar[bool] = False

    @property
    def window(self) -> int:
        return self.seq_len - 2

    def row(self, piece: Piece, chance: np.random.Generator) -> Row:
        spoiled = self.noise.apply(self.sentences.split(piece.ids), chance, mask_id=self.mask_id)
        source, target = (np.concatenate([[self.begin_id], ids, [self.end_id]]) for ids in (spoiled, piece.ids))
        return _seq2seq_row(source, target, self.start_id, self.pad_id, self.seq_len, self.seq_len)


@dataclass(frozen=True)
class PermutationRows:
    """XLNet's rows: text and closing markers (`suffix`: [SEP] [CLS]), which are context and never predicted.

    spans: predict spans of at most that many tokens; None: the last 1/K of a uniform order."""

    seq_len: int
    pad_id: int
    suffix: tuple[int, ...] = ()
    one_in: float = 6.0
    spans: int | None = 5
    context_ordered: bool = False

    batch: ClassVar[type[CorruptedBatch]] = PermutationBatch
    least: ClassVar[int] = 2
    needs_elsewhere: ClassVar[bool] = False

    @property
    def window(self) -> int:
        return self.seq_len - len(self.suffix)

    def row(self, piece: Piece, chance: np.random.Generator) -> Row:
        ids = np.append(piece.ids, np.array(self.suffix, dtype=np.int64))
        allowed = np.arange(len(ids)) < len(piece.ids)
        if self.spans is None:
            predicted = choose_last(allowed, chance, one_in=self.one_in)
        else:
            predicted = choose_spans(allowed, chance, one_in=self.one_in, longest=self.spans)
        order = draw_order(predicted, chance, context_ordered=self.context_ordered)
        most = count_predicted(self.seq_len, self.one_in) + (self.spans or 0)
        return {
            "ids": _padded(ids, self.seq_len, self.pad_id),
            "targets": _padded(np.where(predicted, ids, IGNORE), self.seq_len, IGNORE),
            "documents": _padded(np.zeros_like(ids), self.seq_len, -1),
            "order": _padded(order, self.seq_len, self.seq_len),
            "predict": _padded(np.flatnonzero(predicted), most, -1),
        }


def _masked_row(maker: MaskedRows, ids: np.ndarray, text: np.ndarray, chance: np.random.Generator) -> Row:
    words = None if maker.words is None else _word_numbers(maker.words, ids, text)
    chosen = choose_tokens(text, chance, rate=maker.rate, words=words)
    spoiled, targets = mask_tokens(ids, chosen, chance, mask_id=maker.mask_id, replacements=maker.replacements)
    return {
        "ids": _padded(spoiled, maker.seq_len, maker.pad_id),
        "targets": _padded(targets, maker.seq_len, IGNORE),
        "documents": _padded(np.zeros_like(ids), maker.seq_len, -1),
    }


def _word_numbers(words: WordTable, ids: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Words never reach over a marker, and no marker is in one (a model may have ids that the tokenizer has not)."""
    borders = np.cumsum(np.diff(text, prepend=text[:1]) != 0)
    numbers = borders * len(ids)
    numbers[text] += words.numbers(ids[text])
    return numbers


def _seq2seq_row(
    source: np.ndarray, target: np.ndarray, start_id: int, pad_id: int, source_len: int, target_len: int
) -> Row:
    decoder = np.append(np.array([start_id]), target[:-1])
    return {
        "ids": _padded(decoder, target_len, pad_id),
        "targets": _padded(target, target_len, IGNORE),
        "documents": _padded(np.zeros_like(target), target_len, -1),
        "source": _padded(source, source_len, pad_id),
        "source_documents": _padded(np.zeros_like(source), source_len, -1),
    }


def _padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    if len(values) > length:
        raise HanlinError(f"A row of {len(values)} tokens does not fit into {length}.")
    return np.append(values, np.full(length - len(values), fill)).astype(np.int64)
