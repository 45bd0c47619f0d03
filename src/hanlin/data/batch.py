"""`Batch` is what a model sees; `BatchSource` is what a trainer asks.

Batch order is a function of (seed, global step) alone. A source is asked for *rows of a step*, not for "the next
batch": row r of step s is the same whoever asks, in whatever order, with however many workers, ranks or micro-batches.
So the data position of a checkpoint is its step, and resuming needs no replay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hanlin.nn.losses import IGNORE


@dataclass(frozen=True)
class Batch:
    """Packed rows of documents.

    ids (rows, T) int64; targets (rows, T) int64: the next token of the same document, `IGNORE` where there is no loss
    (prompt tokens, the last token of a document, padding); positions (rows, T) int64: place in its own document;
    documents (rows, T) int64: number of the document within the row, -1 for padding;
    names: for each row, the names of its documents, so that an error can say which text it was.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor
    names: Sequence[Sequence[str]] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens read, padding left out."""
        return int((self.documents >= 0).sum())

    @property
    def one_document_a_row(self) -> bool:
        """No row holds a border, so the plain causal mask is exact (padding stands at the end and harms nobody)."""
        return bool((self.documents <= 0).all())

    def rows(self, start: int, stop: int) -> "Batch":
        """A slice of rows: a micro-batch or a rank's share."""
        part = slice(start, stop)
        return Batch(
            self.ids[part], self.targets[part], self.positions[part], self.documents[part], tuple(self.names[part])
        )

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.ids, self.targets, self.positions, self.documents)
        return Batch(*(t.to(device, non_blocking=True) for t in tensors), self.names)


class BatchSource(Protocol):
    """Batches by step."""

    rows_per_step: int  # rows of one optimizer step over all ranks and micro-batches
    steps_per_epoch: int  # how many steps see everything once (0: endless)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of the step's `rows_per_step` rows (0-based step). A pure function of its arguments."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON of what decides the order (files' hashes, seed, lengths): a resumed run refuses other data."""
        ...


@runtime_checkable
class LiveSource(BatchSource, Protocol):
    """A source whose batches depend on the weights, such as answers that the model itself writes: it is asked for a
    step only when the step before has been made, and what it remembers goes into the checkpoints."""

    def state(self) -> dict[str, Any]:
        """JSON of what it remembers beside the step."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Remember that."""
        ...


def next_token_targets(ids: Tensor, documents: Tensor, trained: Tensor | None = None) -> Tensor:
    """Targets that never cross a document's border.

    ids, documents (rows, T); trained (rows, T) bool: which tokens may be *predicted* (None: all). -> (rows, T) int64:
    targets[t] = ids[t+1] where t and t+1 are of one document, t+1 is trained and is no padding; else `IGNORE`.
    """
    targets = torch.full_like(ids, IGNORE)
    same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    if trained is not None:
        same &= trained[:, 1:]
    targets[:, :-1] = torch.where(same, ids[:, 1:], targets[:, :-1])
    return targets


def document_positions(documents: Tensor) -> Tensor:
    """(rows, T) document numbers -> position of each token within its document (rows, T) int64."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    border = torch.ones_like(documents, dtype=torch.bool)
    border[:, 1:] = documents[:, 1:] != documents[:, :-1]
    start = torch.where(border, index, torch.zeros_like(index)).cummax(dim=1).values
    return index - start
