"""Documents as batches of a pretraining method: cut into pieces, each spoiled by a row maker, one piece a row.

    document (n tokens)  ─→  ceil(n / window) pieces of nearly equal length  ─→  maker.row(piece, chance)

Which piece stands in row r of step s follows from (seed, s, r) alone, and what chance gives to it from (seed, epoch,
piece): the same for any number of workers, ranks and micro-batches. With `masks=None` every epoch spoils a piece anew
(dynamic masking, RoBERTa, arXiv:1907.11692); with `masks=k` there are k ways that take turns (static; BERT: 10).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive
from hanlin.data.batch import document_positions
from hanlin.data.corruption.batches import CorruptedBatch
from hanlin.data.corruption.rows import Piece, RowMaker
from hanlin.data.order import shuffled
from hanlin.data.shards import TokenShards


class Documents(Protocol):
    """Documents by number, without their end tokens."""

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) int64."""
        ...

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, int64."""
        ...

    def name(self, document: int) -> str: ...

    def fingerprint(self) -> dict[str, Any]: ...


class ListedDocuments:
    """Documents in memory: their ids, and names for errors (default: their numbers)."""

    def __init__(self, documents: Sequence[Sequence[int] | np.ndarray], names: Sequence[str] | None = None) -> None:
        if names is not None and len(names) != len(documents):
            raise HanlinError(f"{len(names)} names for {len(documents)} documents; expected one each.")
        self._ids = [np.asarray(document, dtype=np.int64) for document in documents]
        self._names = names

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self._ids], dtype=np.int64)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._ids[document][start:stop]

    def name(self, document: int) -> str:
        return self._names[document] if self._names is not None else str(document)

    def fingerprint(self) -> dict[str, Any]:
        """Hash of every id and border."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for ids in self._ids:
            digest.update(ids.tobytes())
        return {"kind": "list", "sha256": digest.hexdigest()}


class ShardDocuments:
    """Documents of token shards, read through the memory maps; 8 bytes a document are held."""

    def __init__(self, shards: TokenShards) -> None:
        self.shards = shards
        self._edges = np.cumsum([0, *(len(shard.starts) - 1 for shard in shards.shards)])

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.concatenate([np.diff(shard.starts) - 1 for shard in self.shards.shards])  # 1: the end token

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        number, inside = self._place(document)
        shard = self.shards.shards[number]
        begin = int(shard.starts[inside])
        return shard.tokens[begin + start : begin + stop].astype(np.int64)

    def name(self, document: int) -> str:
        number, inside = self._place(document)
        return self.shards.shards[number].name(inside)

    def fingerprint(self) -> dict[str, Any]:
        """The files' hashes."""
        return {"kind": "shards", "shards": [record.files["tokens.npy"][1] for record in self.shards.records]}

    def _place(self, document: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._edges, document, side="right")) - 1
        return number, document - int(self._edges[number])


class CorruptedText:
    """A `BatchSource`: every epoch shows each piece once, in an order given by (seed, epoch), spoiled by `maker`.

    Documents shorter than the maker can use are left out and counted in `dropped`. shuffle False: the order of the
    documents, for evaluation (with masks=1 every epoch is then the same).
    """

    def __init__(
        self,
        documents: Documents,
        maker: RowMaker,
        *,
        rows_per_step: int,
        seed: int = 0,
        masks: int | None = None,
        shuffle: bool = True,
    ) -> None:
        if rows_per_step < 1 or (masks is not None and masks < 1):
            raise HanlinError(f"{rows_per_step} rows a step, masks {masks}: expected at least 1 (or None) each.")
        if maker.window < maker.least:
            raise HanlinError(
                f"The rows leave room for {max(maker.window, 0)} tokens of text; {type(maker).__name__} needs at least "
                f"{maker.least}. Give longer rows."
            )
        self.documents, self.maker, self.rows_per_step = documents, maker, rows_per_step
        self.seed, self.masks, self.shuffle = seed, masks, shuffle
        lengths = documents.lengths
        self._used = np.flatnonzero(lengths >= maker.least)
        self.dropped = len(lengths) - len(self._used)
        needed = 2 if maker.needs_elsewhere else 1
        if len(self._used) < needed:
            raise HanlinError(
                f"{len(self._used)} of {len(lengths)} documents have {maker.least} tokens or more; "
                f"{type(maker).__name__} needs {needed} such documents."
            )
        self._edges = np.cumsum(np.concatenate([[0], -(-lengths[self._used] // maker.window)]))  # of pieces
        self.rows_per_epoch = int(self._edges[-1])
        self.steps_per_epoch = -(-self.rows_per_epoch // rows_per_step)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> CorruptedBatch:
        """Rows [start, stop) of a step."""
        stop = self.rows_per_step if stop is None else stop
        rows, names = [], []
        for sample in range(step * self.rows_per_step + start, step * self.rows_per_step + stop):
            epoch, place = divmod(sample, self.rows_per_epoch)
            piece = shuffled(sample, self.rows_per_epoch, self.seed) if self.shuffle else place
            turn = epoch if self.masks is None else epoch % self.masks
            chance = np.random.default_rng(derive(self.seed, "corrupt", turn, piece))
            used = int(np.searchsorted(self._edges, piece, side="right")) - 1
            rows.append(self.maker.row(self._piece(used, piece - int(self._edges[used])), chance))
            names.append((self.documents.name(int(self._used[used])),))
        tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        return self.maker.batch(positions=document_positions(tensors["documents"]), names=names, **tensors)

    def fingerprint(self) -> dict[str, Any]:
        """What decides every batch."""
        return {
            "kind": "corrupted",
            "documents": self.documents.fingerprint(),
            "maker": describe(self.maker),
            "rows_per_step": self.rows_per_step,
            "seed": self.seed,
            "masks": self.masks,
            "shuffle": self.shuffle,
        }

    def _piece(self, used: int, number: int) -> Piece:
        """Piece `number` of a document that is used: its tokens are shared out evenly, so that none is a crumb."""
        document, count = int(self._used[used]), int(self._edges[used + 1] - self._edges[used])
        length = int(self.documents.lengths[document])
        start, stop = number * length // count, (number + 1) * length // count

        def elsewhere(chance: np.random.Generator, wanted: int) -> np.ndarray:
            other = int(chance.integers(0, len(self._used) - 1))
            other = int(self._used[other + (other >= used)])
            size = int(self.documents.lengths[other])
            begin = int(chance.integers(0, max(1, size - wanted + 1)))
            return self.documents.tokens(other, begin, min(begin + wanted, size))

        return Piece(self.documents.tokens(document, start, stop), number + 1 == count, elsewhere)


def describe(value: Any) -> Any:
    """JSON of a maker's settings; arrays and bytes by their hash."""
    if isinstance(value, tuple) and any(isinstance(item, bytes) for item in value):
        value = np.frombuffer(b"".join(len(item).to_bytes(4, "little") + item for item in value), dtype=np.uint8)
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value
