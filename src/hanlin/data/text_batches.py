"""Token shards as batches for pretraining.

All documents of all shards stand in one long stream, each closed by its end token; the stream is cut every `seq_len`
tokens. A row reads one token further than it is long, so that its last token has a target too: over an epoch every
token but the first of each document is predicted exactly once.

    stream    a a a a ■ b b b ■ c c c c c ■          ■ end token
    row 0     a a a a ■ b        targets  a a a ■ · b
    row 1     b b ■ c c c        targets  b ■ · c c c
    row 2     c c                targets  c ■

A document that is cut between two rows begins anew in the second: what stands in the row before is not seen, so
positions restart there. Nothing else crosses: targets and positions stop at documents' borders, and `documents` tells
the mask where they are.
"""

from typing import Any

import numpy as np
import torch

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch, document_positions
from hanlin.data.order import shuffled
from hanlin.data.shards import TokenShards
from hanlin.nn.losses import IGNORE


class ShardedText:
    """A `BatchSource` over token shards. Each epoch shows every row once, in an order given by (seed, epoch).

    shuffle False: the order of the files, for evaluation.
    """

    def __init__(
        self, shards: TokenShards, *, seq_len: int, rows_per_step: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        if seq_len < 1 or rows_per_step < 1:
            raise HanlinError(f"Rows of {seq_len} tokens, {rows_per_step} a step: expected at least 1 each.")
        self.shards, self.seq_len, self.rows_per_step = shards, seq_len, rows_per_step
        self.seed, self.shuffle = seed, shuffle
        self._edges = np.cumsum([0, *(len(shard.tokens) for shard in shards.shards)])  # of the shards in the stream
        self.rows_per_epoch = max(1, -(-(int(self._edges[-1]) - 1) // seq_len))
        self.steps_per_epoch = -(-self.rows_per_epoch // rows_per_step)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of a step."""
        stop = self.rows_per_step if stop is None else stop
        samples = range(step * self.rows_per_step + start, step * self.rows_per_step + stop)
        if self.shuffle:
            return self._rows([shuffled(sample, self.rows_per_epoch, self.seed) for sample in samples])
        return self._rows([sample % self.rows_per_epoch for sample in samples])

    def fingerprint(self) -> dict[str, Any]:
        """What decides every batch."""
        return {
            "kind": "text",
            "shards": [record.files["tokens.npy"][1] for record in self.shards.records],
            "seq_len": self.seq_len,
            "rows_per_step": self.rows_per_step,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _rows(self, places: list[int]) -> Batch:
        ids = np.full((len(places), self.seq_len), self.shards.eos_id, dtype=np.int64)
        targets = np.full_like(ids, IGNORE)
        documents = np.full_like(ids, -1)
        names = []
        for row, place in enumerate(places):
            start = place * self.seq_len
            tokens, numbers, titles = self._read(start, min(start + self.seq_len + 1, int(self._edges[-1])))
            size = max(1, len(tokens) - 1)
            ids[row, :size], documents[row, :size] = tokens[:size], numbers[:size]
            same = numbers[1:] == numbers[:-1]
            targets[row, : len(same)][same] = tokens[1:][same]
            names.append(titles[: int(numbers[size - 1]) + 1])
        borders = torch.from_numpy(documents)
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets), document_positions(borders), borders, names)

    def _read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Tokens [start, stop) of the stream, the number of each one's document from 0, and the documents' names."""
        tokens, numbers, names = [], [], []
        first = int(np.searchsorted(self._edges, start, side="right")) - 1
        for number in range(first, len(self.shards.shards)):
            edge = int(self._edges[number])
            if edge >= stop:
                break
            shard = self.shards.shards[number]
            here, there = max(0, start - edge), min(len(shard.tokens), stop - edge)
            begin, end = (int(np.searchsorted(shard.starts, place, side="right")) for place in (here, there - 1))
            jumps = np.zeros(there - here, dtype=np.int64)
            jumps[shard.starts[begin:end] - here] = 1
            tokens.append(shard.tokens[here:there])
            numbers.append(np.cumsum(jumps) + len(names))
            names += [shard.name(document) for document in range(begin - 1, end)]
        return np.concatenate(tokens).astype(np.int64), np.concatenate(numbers), names
