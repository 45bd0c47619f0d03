"""Short examples packed into rows: several stand side by side, never see each other, and none is cut in two.

Padding every conversation to the longest wastes most of a row. Best-fit decreasing (Johnson 1974; for language models
arXiv:2404.10830) takes the examples from the longest to the shortest and puts each where the least room stays free: at
most 11/9 of the rows of the best packing and one more, on conversations within a percent of full rows.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive
from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.data.examples import Example

__all__ = ["Example", "PackedExamples", "pack_documents"]


def pack_documents(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: bins of document numbers, each document in one bin, each bin's lengths at most `capacity`.

    Equal lengths keep their order, so a shuffled input gives other companions; how many bins there are depends on the
    lengths alone. O(n log capacity). Raises `HanlinError` for a length outside 1 … capacity.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    bins: list[list[int]] = []
    rooms: list[int] = []  # different amounts of free room, ascending
    having: dict[int, list[int]] = {}  # free room -> bins that have it
    for number in order:
        length = lengths[number]
        if not 1 <= length <= capacity:
            raise HanlinError(f"Document {number} is {length} tokens long; a row holds 1 to {capacity}.")
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[place]
            chosen = having[room].pop()
            if not having[room]:
                del rooms[place], having[room]
        bins[chosen].append(number)
        left = room - length
        if left:
            if left not in having:
                insort(rooms, left)
            having.setdefault(left, []).append(chosen)
    return bins


class PackedExamples:
    """A `BatchSource` of examples: every epoch shows each once, packed and ordered anew by (seed, epoch).

    examples: at least one. seq_len: tokens of a row. pad_id: fills the end of a row. pack: several examples a row;
    else one. overlong: an example longer than a row is cut at its end ("truncate", counted in `truncated`) or refused
    ("refuse", `HanlinError` with its name). One without any token to predict, as it came or after the cut, is left out
    and counted in `dropped`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        seq_len: int,
        rows_per_step: int,
        seed: int,
        pad_id: int,
        pack: bool = True,
        overlong: Literal["truncate", "refuse"] = "truncate",
    ) -> None:
        if seq_len < 2 or rows_per_step < 1:
            raise HanlinError(f"Rows of {seq_len} tokens, {rows_per_step} a step: expected at least 2 and 1.")
        self.seq_len, self.rows_per_step, self.seed, self.pad_id, self.pack = seq_len, rows_per_step, seed, pad_id, pack
        self.truncated = self.dropped = 0
        names: list[str] = []
        ids: list[np.ndarray] = []
        trained: list[np.ndarray] = []
        for example in examples:
            if len(example.ids) != len(example.trained):
                raise HanlinError(
                    f"{example.name} has {len(example.ids)} tokens but {len(example.trained)} marks of what is trained."
                )
            if len(example.ids) > seq_len and overlong == "refuse":
                raise HanlinError(
                    f"{example.name} has {len(example.ids)} tokens; a row holds {seq_len}. Give longer rows, shorten "
                    "it, or let long examples be cut (truncate)."
                )
            marks = np.array(example.trained[:seq_len], dtype=bool)
            if not marks[1:].any():
                self.dropped += 1
                continue
            self.truncated += len(example.ids) > seq_len
            names.append(example.name)
            ids.append(np.array(example.ids[:seq_len], dtype=np.int32))
            trained.append(marks)
        if not names:
            raise HanlinError(
                f"None of {len(examples)} examples has a token to predict within the first {seq_len}: there is nothing "
                "to learn. Give examples with answers, or longer rows."
            )
        self._names = names
        self._lengths = [len(tokens) for tokens in ids]
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._ids, self._trained = np.concatenate(ids), np.concatenate(trained)
        self._epochs: dict[int, list[list[int]]] = {}
        self.rows_per_epoch = len(self._rows(0))
        self.steps_per_epoch = -(-self.rows_per_epoch // rows_per_step)

    @property
    def density(self) -> float:
        """Share of the places of an epoch's rows that hold a token."""
        return len(self._ids) / (self.rows_per_epoch * self.seq_len)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of a step."""
        stop = self.rows_per_step if stop is None else stop
        ids = np.full((stop - start, self.seq_len), self.pad_id, dtype=np.int64)
        documents = np.full_like(ids, -1)
        trained = np.zeros_like(ids, dtype=bool)
        names = []
        for row in range(stop - start):
            epoch, place = divmod(step * self.rows_per_step + start + row, self.rows_per_epoch)
            members = self._rows(epoch)[place]
            at = 0
            for number, member in enumerate(members):
                source = slice(self._starts[member], self._starts[member + 1])
                target = slice(at, at + self._lengths[member])
                ids[row, target], trained[row, target] = self._ids[source], self._trained[source]
                documents[row, target] = number
                at = target.stop
            names.append([self._names[member] for member in members])
        tokens, borders = torch.from_numpy(ids), torch.from_numpy(documents)
        targets = next_token_targets(tokens, borders, torch.from_numpy(trained))
        return Batch(tokens, targets, document_positions(borders), borders, names)

    def fingerprint(self) -> dict[str, Any]:
        """What decides every batch."""
        digest = hashlib.sha256(self._ids.tobytes())
        digest.update(self._trained.tobytes())
        digest.update(np.array(self._lengths).tobytes())
        return {
            "kind": "examples",
            "sha256": digest.hexdigest(),
            "seq_len": self.seq_len,
            "rows_per_step": self.rows_per_step,
            "seed": self.seed,
            "pad_id": self.pad_id,
            "pack": self.pack,
        }

    def _rows(self, epoch: int) -> list[list[int]]:
        """Which examples stand in each row of an epoch."""
        found = self._epochs.get(epoch)
        if found is None:
            chance = np.random.default_rng(derive(self.seed, "pack", epoch))
            order = chance.permutation(len(self._lengths)).tolist()
            lengths = [self._lengths[number] for number in order]
            bins = pack_documents(lengths, self.seq_len) if self.pack else [[place] for place in range(len(order))]
            rows = [[order[place] for place in bin_] for bin_ in bins]
            found = [rows[place] for place in chance.permutation(len(rows))]
            kept = {number: rows for number, rows in self._epochs.items() if number >= epoch - 1}
            self._epochs = dict(list(kept.items())[-1:]) | {epoch: found}  # a step may lie across two epochs
        return found
