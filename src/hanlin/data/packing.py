"""Short examples packed into rows: several stand side by side, never see each other, and none is cut in two.

Padding every conversation to the longest wastes most of a row. Best-fit decreasing (Johnson 1974; for language models
arXiv:2404.10830) takes the examples from the longest to the shortest and puts each where the least room stays free: at
most 11/9 of the rows of the best packing and one more, on conversations within a percent of full rows.
"""

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive
from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.data.examples import Example
from hanlin.data.sequence_batch import SequenceBatch, stack_numbers

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

    examples: at least one; a list of them in the place of one is a group, whose members stand in one row in their order
    (a pair of answers); the batches of groups are `SequenceBatch`es with the examples' numbers. seq_len: tokens of a
    row. pad_id: fills the end of a row. pack: several examples a row; else one. overlong: an example longer than a row
    is cut at its end ("truncate", counted in `truncated`) or refused ("refuse", `HanlinError` with its name), as a
    group always is. One without any token to predict, as it came or after the cut, is left out and counted in
    `dropped`, and with it the rest of its group.
    """

    def __init__(
        self,
        examples: Sequence[Example | Sequence[Example]],
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
        self._grouped = any(not isinstance(example, Example) for example in examples)
        if self._grouped:
            overlong = "refuse"
        kept: list[Example] = []
        self._groups: list[range] = []  # members of each, among the kept
        for example in examples:
            members = self._checked([example] if isinstance(example, Example) else example, overlong)
            if members:
                self._groups.append(range(len(kept), len(kept) + len(members)))
                kept += members
        if not kept:
            raise HanlinError(
                f"None of {len(examples)} examples has a token to predict within the first {seq_len}: there is nothing "
                "to learn. Give examples with answers, or longer rows."
            )
        self._names = [example.name for example in kept]
        self._numbers = [example.numbers for example in kept]
        self._lengths = [len(example.ids) for example in kept]
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._ids = np.concatenate([np.array(example.ids, dtype=np.int32) for example in kept])
        self._trained = np.concatenate([np.array(example.trained, dtype=bool) for example in kept])
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
        rows: list[list[int]] = []
        for row in range(stop - start):
            epoch, place = divmod(step * self.rows_per_step + start + row, self.rows_per_epoch)
            members = [member for group in self._rows(epoch)[place] for member in self._groups[group]]
            rows.append(members)
            at = 0
            for number, member in enumerate(members):
                source = slice(self._starts[member], self._starts[member + 1])
                target = slice(at, at + self._lengths[member])
                ids[row, target], trained[row, target] = self._ids[source], self._trained[source]
                documents[row, target] = number
                at = target.stop
        names = [[self._names[member] for member in members] for members in rows]
        tokens, borders = torch.from_numpy(ids), torch.from_numpy(documents)
        targets = next_token_targets(tokens, borders, torch.from_numpy(trained))
        fields = (tokens, targets, document_positions(borders), borders, names)
        if not self._grouped:
            return Batch(*fields)
        known = self._numbers[0]
        table = {name: stack_numbers([[self._numbers[m][name] for m in members] for members in rows]) for name in known}
        return SequenceBatch(*fields, table)

    def _checked(self, members: Sequence[Example], overlong: str) -> list[Example]:
        """The members as they go into a row; none if one of them has nothing to predict."""
        cut = []
        for example in members:
            if len(example.ids) != len(example.trained):
                raise HanlinError(
                    f"{example.name} has {len(example.ids)} tokens but {len(example.trained)} marks of what is trained."
                )
            if overlong == "refuse" and sum(len(member.ids) for member in members) > self.seq_len:
                raise HanlinError(
                    f"{example.name} has {sum(len(member.ids) for member in members)} tokens; a row holds "
                    f"{self.seq_len}. Give longer rows, shorten it, or let long examples be cut (truncate)."
                )
            if not any(example.trained[1 : self.seq_len]):
                self.dropped += 1
                return []
            if len(example.ids) > self.seq_len:
                self.truncated += 1
                example = replace(example, ids=example.ids[: self.seq_len], trained=example.trained[: self.seq_len])
            cut.append(example)
        return cut

    def _length(self, group: int) -> int:
        return sum(self._lengths[member] for member in self._groups[group])

    def fingerprint(self) -> dict[str, Any]:
        """What decides every batch."""
        digest = hashlib.sha256(self._ids.tobytes())
        digest.update(self._trained.tobytes())
        digest.update(np.array(self._lengths).tobytes())
        if self._grouped:
            sizes = [len(group) for group in self._groups]
            digest.update(json.dumps([sizes, [dict(numbers) for numbers in self._numbers]]).encode())
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
        """Which groups stand in each row of an epoch."""
        found = self._epochs.get(epoch)
        if found is None:
            chance = np.random.default_rng(derive(self.seed, "pack", epoch))
            order = chance.permutation(len(self._groups)).tolist()
            lengths = [self._length(number) for number in order]
            bins = pack_documents(lengths, self.seq_len) if self.pack else [[place] for place in range(len(order))]
            rows = [[order[place] for place in bin_] for bin_ in bins]
            found = [rows[place] for place in chance.permutation(len(rows))]
            kept = {number: rows for number, rows in self._epochs.items() if number >= epoch - 1}
            self._epochs = dict(list(kept.items())[-1:]) | {epoch: found}  # a step may lie across two epochs
        return found
