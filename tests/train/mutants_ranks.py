"""Plausible mistakes in training over processes: each a patch of this process, made in every process alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hanlin.parallel.context as context
import hanlin.parallel.crossing as crossing
import hanlin.parallel.data as data
import hanlin.parallel.ring as ring
import hanlin.parallel.tensor as tensor
import hanlin.train.cluster as cluster
from hanlin.nn.routing import Routing
from hanlin.parallel.data import DataParallel
from hanlin.parallel.expert import Travel
from hanlin.parallel.mesh import Mesh
from hanlin.parallel.pipeline import Pipeline
from hanlin.parallel.shares import Share
from hanlin.parallel.zero import Zero
from hanlin.train.balance import Balance
from hanlin.train.exchange import MatrixExchange

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]


def gradients_stay_here(patch: Patch) -> None:
    patch.setattr(DataParallel, "_start", lambda self, number: self._gradients[number].complete())


def one_bucket_stays_here(patch: Patch) -> None:
    """The first of several buckets is forgotten."""
    original = DataParallel._start
    patch.setattr(data, "BUCKET", 2**16)

    def start(self: DataParallel, number: int) -> None:
        if number:
            original(self, number)
        else:
            self._gradients[number].complete()

    patch.setattr(DataParallel, "_start", start)


def gradients_averaged(patch: Patch) -> None:
    original = DataParallel.finish

    def finish(self: DataParallel) -> None:
        original(self)
        for piece in self.pieces.values():
            if piece.grad is not None:
                piece.grad /= dist.get_world_size(self._group)

    patch.setattr(DataParallel, "finish", finish)


def partial_sums_leave(patch: Patch) -> None:
    patch.setattr(crossing, "sum_out", lambda x, group: x)


def input_gradients_stay_here(patch: Patch) -> None:
    patch.setattr(crossing, "copy_in", lambda x, group: x)


def own_denominators(patch: Patch) -> None:
    """Each rank divides by what it counted; tokens and the wish to stop are summed as ever."""
    original = cluster.Cluster.sum_rows

    def sum_rows(self: cluster.Cluster, values: Any) -> list[float]:
        values = list(values)
        return [*values[:-2], *original(self, values)[-2:]]

    patch.setattr(cluster.Cluster, "sum_rows", sum_rows)


def denominators_counted_by_every_rank(patch: Patch) -> None:
    """Ranks that read the same rows are not told apart from those that read others."""
    patch.setattr(cluster.Cluster, "sum_rows", cluster.Cluster.sum)


def zero_range_off_by_one(patch: Patch) -> None:
    """A piece takes its gradient from one number further on."""
    original = Share.settle

    def settle(self: Share) -> None:
        arriving = bool(self._reducing)
        original(self)
        if arriving and self._sum is not None:
            self._sum = self._sum.roll(-1)

    patch.setattr(Share, "settle", settle)


def stale_weights(patch: Patch) -> None:
    patch.setattr(Zero, "publish", lambda self: None)


def shares_not_summed(patch: Patch) -> None:
    """Every rank keeps its own gradient of its share."""

    def reduce(mine: Tensor, buffer: Tensor, group: Any) -> Any:
        mine.copy_(buffer.chunk(dist.get_world_size(group))[dist.get_rank(group)])
        return dist.barrier(group=group, async_op=True)

    patch.setattr("hanlin.parallel.shares.reduce", reduce)


def wrong_columns(patch: Patch) -> None:
    """Matrices that are cut by columns get another rank's."""
    original = tensor.cut_tensor

    def cut_tensor(whole: Tensor, layout: Any, units: int, rank: int, ranks: int) -> Tensor:
        return original(whole, layout, units, ranks - 1 - rank if layout.dim == 1 else rank, ranks)

    patch.setattr(tensor, "cut_tensor", cut_tensor)


def norm_counts_copies(patch: Patch) -> None:
    """What all tensor ranks hold whole goes into the norm once a rank."""
    patch.setattr(cluster, "copies", lambda model: dict.fromkeys(dict(model.named_parameters()), 1))


def norm_counts_tied_twice(patch: Patch) -> None:
    patch.setattr(Pipeline, "counted_elsewhere", set())


def norms_gradients_stay_here(patch: Patch) -> None:
    """Each rank knows the gradients of norms of its own tokens alone."""
    original = crossing.on_gradient
    patch.setattr(crossing, "on_gradient", lambda parameter, hook: original(parameter, lambda gradient: gradient))


def scaled_by_micro_batches(patch: Patch) -> None:
    original = Pipeline._training_order

    def order(self: Pipeline, places: Any, count: int) -> Any:
        found = original(self, places, count)
        found.scale_grads = True  # torch's default: losses that are means
        return found

    patch.setattr(Pipeline, "_training_order", order)


def tied_gradient_stays_here(patch: Patch) -> None:
    patch.setattr(Pipeline, "_sum_table", lambda self: None)


def unweighted_ring(patch: Patch) -> None:
    """Parts of attention are added as they are, without the weight that their log-sums give them."""

    def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return first[0] + second[0], torch.logaddexp(first[1], second[1])

    patch.setattr(ring, "merge", merge)


def consecutive_places(patch: Patch) -> None:
    """Ring: masks are made as if the tokens of a rank were consecutive."""

    def plan(mask: Any, chunks: Any, rank: int, device: Any) -> Any:
        ranks, size = len(chunks), chunks[0][0][1] - chunks[0][0][0]
        starts = [2 * size * number for number in range(ranks)]
        return ring.ring_plan(mask, [[(s, s + size), (s + size, s + 2 * size)] for s in starts], rank, device)

    patch.setattr(context, "ring_plan", plan)


def own_loads(patch: Patch) -> None:
    original = Balance.__init__

    def init(self: Balance, *arguments: Any, **rest: Any) -> None:
        original(self, *arguments, **(rest | {"group": None}))

    patch.setattr(Balance, "__init__", init)


def rows_by_expert_then_rank(patch: Patch) -> None:
    """Rows arrive by rank, then by expert; here they are read the other way round."""

    def here(self: Travel, arriving: Tensor, arrived: Tensor) -> Routing:
        experts = torch.arange(arriving.shape[1]).repeat_interleave(self.ranks)
        expert = experts.repeat_interleave(arriving.T.flatten(), output_size=len(arrived))[:, None]
        ones = torch.ones(expert.shape, dtype=arrived.dtype)
        return Routing(ones, expert, ones, ones)

    patch.setattr(Travel, "_here", here)


def experts_summed_again(patch: Patch) -> None:
    """The experts of different ranks are taken for replicas of one another."""
    original = Mesh.open

    def opened(layout: Any, device: torch.device) -> Mesh:
        found = original(layout, device)
        found.places["expert_replicas"] = found.places["replicas"]
        return found

    patch.setattr(Mesh, "open", opened)


def own_part_is_the_matrix(patch: Patch) -> None:
    """Muon takes the other ranks' shares for zeros."""
    original = MatrixExchange.whole

    def whole(self: MatrixExchange, name: str, piece: Tensor) -> Tensor:
        found = original(self, name, piece)
        start, stop = self._mine[name]
        mask = torch.zeros(found.numel(), dtype=found.dtype)
        mask[start:stop] = 1
        return found * mask.view(found.shape)

    patch.setattr(MatrixExchange, "whole", whole)


def own_loss(patch: Patch) -> None:
    """Each replica reports its share of the loss as the loss."""
    patch.setattr(cluster.Cluster, "sum_loss", lambda self, loss: loss)


# mistake -> (layout that shows it, patch)
MUTANTS: dict[str, tuple[str, Mutation]] = {
    "no all-reduce of gradients": ("two", gradients_stay_here),
    "no all-reduce of one bucket": ("two", one_bucket_stays_here),
    "gradients averaged": ("two", gradients_averaged),
    "local denominator": ("two", own_denominators),
    "loss of one replica": ("two", own_loss),
    "no sum of tensor-parallel outputs": ("tp2", partial_sums_leave),
    "no sum of tensor-parallel input gradients": ("tp2", input_gradients_stay_here),
    "columns of another rank": ("tp2", wrong_columns),
    "norm counts copies": ("tp2", norm_counts_copies),
    "denominator counted by every tensor rank": ("tp2", denominators_counted_by_every_rank),
    "no sum of norms' gradients": ("two-sequence", norms_gradients_stay_here),
    "ZeRO range off by one": ("two-zero1", zero_range_off_by_one),
    "ZeRO weights not gathered": ("two-zero1", stale_weights),
    "ZeRO gradients not summed": ("two-zero1", shares_not_summed),
    "Muon sees its own part": ("two-zero1-muon", own_part_is_the_matrix),
    "pipeline divides by micro-batches": ("two-stages", scaled_by_micro_batches),
    "tied gradient not summed": ("two-stages-tied", tied_gradient_stays_here),
    "norm counts the tied table twice": ("two-stages-tied", norm_counts_tied_twice),
    "ring without log-sum weights": ("cp2-ring", unweighted_ring),
    "ring masks consecutive tokens": ("cp2-ring", consecutive_places),
    "loads of one rank": ("two-moe", own_loads),
    "experts read rows in another order": ("ep2", rows_by_expert_then_rank),
    "experts of ranks summed": ("ep2", experts_summed_again),
}
