"""Several sources in one stream of batches, each with its share of the rows.

Which source fills a row is a function of (seed, global row) alone; over every 4,096 rows each source has its share to
within one row (`order.mixed`). A source counts its own rows, so its epochs go on whatever the others do.
"""

from collections.abc import Sequence
from typing import Any

import torch

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch, BatchSource
from hanlin.data.order import mixed


class Mixture:
    """A `BatchSource` of sources whose rows are equally long.

    weights: shares of the rows, they need not sum to 1; 0 leaves a source out. One epoch lasts until every source has
    been seen once (0 steps, endless, if one of them is), or the one with the number `epoch_of`.
    """

    def __init__(
        self,
        sources: Sequence[BatchSource],
        weights: Sequence[float],
        *,
        rows_per_step: int,
        seed: int,
        epoch_of: int | None = None,
    ) -> None:
        if len(sources) != len(weights):
            raise HanlinError(f"A mixture of {len(sources)} sources has {len(weights)} weights; give one for each.")
        mixed(0, weights, seed)  # refuses negative weights and a sum of zero
        self.sources, self.weights, self.rows_per_step, self.seed = list(sources), list(weights), rows_per_step, seed
        used = [(source, weight / sum(weights)) for source, weight in zip(sources, weights, strict=True) if weight]
        if epoch_of is not None:
            if not weights[epoch_of]:
                raise HanlinError(f"The epochs of a mixture are source {epoch_of}'s, which has the weight 0.")
            used = [(sources[epoch_of], weights[epoch_of] / sum(weights))]
        rows = [source.steps_per_epoch * source.rows_per_step / share for source, share in used]
        self.steps_per_epoch = int(-(-max(rows) // rows_per_step)) if all(rows) else 0

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of a step."""
        stop = self.rows_per_step if stop is None else stop
        parts = []
        for sample in range(step * self.rows_per_step + start, step * self.rows_per_step + stop):
            number, before = mixed(sample, self.weights, self.seed)
            source = self.sources[number]
            own_step, row = divmod(before, source.rows_per_step)
            parts.append(source.batch(own_step, row, row + 1))
        return join_rows(parts)

    def fingerprint(self) -> dict[str, Any]:
        """What decides every batch."""
        return {
            "kind": "mixture",
            "sources": [source.fingerprint() for source in self.sources],
            "weights": self.weights,
            "rows_per_step": self.rows_per_step,
            "seed": self.seed,
        }


def join_rows(parts: Sequence[Batch]) -> Batch:
    """Batches below one another; their rows must be equally long."""
    kinds = {type(part).__name__ for part in parts if type(part) is not Batch}
    if kinds:
        raise HanlinError(f"A mixture joins plain batches; {', '.join(sorted(kinds))} holds more, which would be lost.")
    widths = {part.ids.shape[1] for part in parts}
    if len(widths) > 1:
        raise HanlinError(f"A mixture needs rows of one length; found rows of {sorted(widths)} tokens.")
    return Batch(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([part.positions for part in parts]),
        torch.cat([part.documents for part in parts]),
        [names for part in parts for names in part.names],
    )
