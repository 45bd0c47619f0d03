"""What the pretraining methods' batches hold beside `Batch`: one document (or pair) a row, padded at its end.

    MaskedBatch        ids as spoiled, targets where something was chosen · segments, and whether the pair is real
    PrefixBatch        how many tokens of each row are read in both directions
    Seq2SeqBatch       ids are what the decoder reads, source what the encoder reads
    PermutationBatch   the rank of each token in the factorisation order, and which places are predicted

Each is a `Batch`, with its `rows`, `to`, `tokens` and `names`: the trainer needs to know nothing of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from hanlin.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class CorruptedBatch(Batch):
    """A batch whose further fields are tensors (or None) with one entry a row."""

    def rows(self, start: int, stop: int) -> "CorruptedBatch":
        """A slice of rows: a micro-batch or a rank's share."""
        part = slice(start, stop)
        return replace(self._each(lambda tensor: tensor[part]), names=tuple(self.names[part]))

    def to(self, device: torch.device) -> "CorruptedBatch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "CorruptedBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


@dataclass(frozen=True, kw_only=True)
class MaskedBatch(CorruptedBatch):
    """targets: the token itself, at its own place. segments (rows, T) int64: 0 first text, 1 second; next_sentence
    (rows,) int64: 0 the second text follows, 1 it is from elsewhere (`sentence_pairs`). Both None without pairs."""

    segments: Tensor | None = None
    next_sentence: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PrefixBatch(CorruptedBatch):
    """prefix (rows,) int64: tokens at the row's begin that all of it sees."""

    prefix: Tensor


@dataclass(frozen=True, kw_only=True)
class Seq2SeqBatch(CorruptedBatch):
    """ids, targets, positions, documents (rows, T) are the decoder's. source, source_documents (rows, S) int64: what
    the encoder reads, and 0 for a token, -1 for padding."""

    source: Tensor
    source_documents: Tensor

    @property
    def tokens(self) -> int:
        """Tokens read by encoder and decoder, padding left out."""
        return int((self.documents >= 0).sum() + (self.source_documents >= 0).sum())


@dataclass(frozen=True, kw_only=True)
class PermutationBatch(CorruptedBatch):
    """ids as they are; targets (rows, T): the token itself where it is predicted, else `IGNORE`. order (rows, T) int64:
    ranks (`permutation_lm`), padding behind all; predict (rows, P) int64: the places that are predicted, ascending, -1
    where a row has fewer."""

    order: Tensor
    predict: Tensor
