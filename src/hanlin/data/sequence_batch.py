"""`SequenceBatch`: packed rows whose documents carry numbers, for methods that look at whole answers or weigh tokens.

    row     | question answer A | question answer B | pad |      one unit: a pair, a group, a rollout's answers
    numbers   of a document: its score, its group, what the reference gives it           (rows, documents)
    tokens    of a token: its advantage, the log-probability it was drawn with           (rows, T), its own

`trained` gives the trained tokens flat, with whose they are. Every loss of `align` reads that: no loss knows of rows,
padding, or which position predicts which token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hanlin.data.batch import Batch
from hanlin.nn.losses import IGNORE

Metrics = dict[str, tuple[float, float]]  # name -> (sum, count)


@dataclass(frozen=True)
class Trained:
    """The trained tokens of a batch in reading order. at (rows, T): the positions that predict them; ids (n,): which
    tokens they are; sequence (n,): whose, 0 ... count - 1; a document without a trained token has none here."""

    at: Tensor
    ids: Tensor
    sequence: Tensor
    count: int


@dataclass(frozen=True)
class SequenceBatch(Batch):
    """numbers: by name (rows, most documents of a row), what stands behind a row's last document means nothing; tokens:
    by name (rows, T, ...), entry t about token t; notes: what the maker of the batch wants logged, once a batch."""

    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    tokens_of: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Metrics = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> "SequenceBatch":
        base = super().rows(start, stop)
        numbers, tokens = (
            {name: tensor[start:stop] for name, tensor in table.items()} for table in (self.numbers, self.tokens_of)
        )
        return SequenceBatch(*_fields(base), numbers, tokens, self.notes if start == 0 else {})

    def to(self, device: torch.device) -> "SequenceBatch":
        base = super().to(device)
        numbers, tokens = (
            {name: tensor.to(device, non_blocking=True) for name, tensor in table.items()}
            for table in (self.numbers, self.tokens_of)
        )
        return SequenceBatch(*_fields(base), numbers, tokens, self.notes)

    def with_numbers(
        self, numbers: Mapping[str, Tensor] | None = None, tokens: Mapping[str, Tensor] | None = None
    ) -> "SequenceBatch":
        """The same rows, knowing more. numbers: of the documents, flat (count,) or by row; tokens: by row (rows, T)."""
        laid = {name: self._by_row(values) for name, values in (numbers or {}).items()}
        return SequenceBatch(*_fields(self), {**self.numbers, **laid}, {**self.tokens_of, **(tokens or {})}, self.notes)

    @cached_property
    def _documents_a_row(self) -> Tensor:
        return self.documents.amax(1) + 1  # (rows,)

    @property
    def sequences(self) -> int:
        """How many documents there are."""
        return int(self._documents_a_row.sum())

    @cached_property
    def trained(self) -> Trained:
        """The trained tokens, flat."""
        at = self.targets != IGNORE
        return Trained(at, self.targets[at], self.sequence_of_position[at], self.sequences)

    @cached_property
    def sequence_of_position(self) -> Tensor:
        """(rows, T): the number of each position's document in the batch; meaningless at padding."""
        before = self._documents_a_row.cumsum(0) - self._documents_a_row
        return before[:, None] + self.documents.clamp_min(0)

    def of_sequences(self, name: str) -> Tensor:
        """The numbers `name` of all documents in order: (count,)."""
        table = self.numbers[name]
        place = torch.arange(table.shape[1], device=table.device)
        return table[place[None] < self._documents_a_row[:, None]]

    def of_trained(self, name: str) -> Tensor:
        """The numbers `name` of the trained tokens in order: (n, ...)."""
        return self.tokens_of[name][:, 1:][self.trained.at[:, :-1]]

    def lay_trained(self, values: Tensor) -> Tensor:
        """Values of the trained tokens (n, ...) at their own places: (rows, T, ...), zero elsewhere."""
        out = values.new_zeros(*self.ids.shape, *values.shape[1:])
        out[:, 1:][self.trained.at[:, :-1]] = values
        return out

    def ends(self) -> Tensor:
        """(rows, T) bool: the last token of each document, in order."""
        following = torch.full_like(self.documents, -1)
        following[:, :-1] = self.documents[:, 1:]
        return (self.documents >= 0) & (following != self.documents)

    def _by_row(self, values: Tensor) -> Tensor:
        if values.ndim == 2:
            return values
        most = int(self._documents_a_row.max())
        out = values.new_zeros(len(self), most)
        place = torch.arange(most, device=values.device)
        out[place[None] < self._documents_a_row[:, None].to(values.device)] = values
        return out


def stack_numbers(rows: Sequence[Sequence[float]]) -> Tensor:
    """Numbers of each row's documents as one table, fp32 (rows, most); 0 behind a row's last document."""
    most = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[0.0] * (most - len(row))] for row in rows], dtype=torch.float32)


def _fields(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Sequence[Sequence[str]]]:
    return batch.ids, batch.targets, batch.positions, batch.documents, batch.names
