"""How the trainer sees the processes of a run: one model laid over a `Mesh`, and what has to be summed over it.

Rows of a step go to the ranks of the data axis; the ranks of one replica (pipeline x context x tensor) read the same
rows. Every loss is a sum over tokens, divided by totals that are known before the first backward, so gradients and
losses are added up and never averaged. Without a process group everything here is the identity.

    order   tensor (+ sequence) -> experts -> pipeline -> context -> recompute -> replicas (plain, ZeRO)
"""

from collections.abc import Generator, Iterable, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hanlin.data.batch import Batch
from hanlin.models.transformer import Output, Transformer
from hanlin.parallel.context import ContextParallel
from hanlin.parallel.data import DataParallel
from hanlin.parallel.expert import expert_cut, expert_parameters, split_experts
from hanlin.parallel.mesh import Mesh
from hanlin.parallel.replication import Replication
from hanlin.parallel.settings import Layout
from hanlin.parallel.tensor import copies, cut_of, shard
from hanlin.parallel.zero import Zero
from hanlin.train.exchange import MatrixExchange
from hanlin.train.objective import document_mask
from hanlin.train.optim import parameter_kinds
from hanlin.train.saving import Laid, model_tensors, tensor_cuts
from hanlin.train.sharded import Share
from hanlin.train.token_loss import token_loss

if TYPE_CHECKING:
    from hanlin.parallel.pipeline import Pipeline

T = TypeVar("T")
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


class Cluster:
    """One process's part of a run. `lay` cuts the model, `replicate` arranges for its gradients."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.mesh = Mesh.open(layout, device)
        self.layout = self.mesh.layout
        self.rank, self.world, self.device = self.mesh.rank, self.mesh.world, device
        self.pipeline: Pipeline | None = None
        self.context: ContextParallel | None = None
        self.replications: list[Replication] = []
        self._shared: dict[Zero, Set[str]] = {}
        self._sharers: dict[str, Any] = {}  # of a parameter that ZeRO shares: the group
        self.shares: dict[
            str, float
        ] = {}  # of a parameter in a sum over all ranks: 1 / those that hold the same numbers

    # --- laying ---

    def lay(self, model: Transformer) -> None:
        """Leave this rank's part of the model in it. Every rank holds the same whole model before (rank 0's counts)."""
        self.broadcast(model.state_dict(keep_vars=True).values())
        self.kinds = parameter_kinds(model)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
        self.described = {
            name: [*p.shape, "trained" if p.requires_grad else "frozen"] for name, p in model.named_parameters()
        }
        mesh, layout = self.mesh, self.layout
        if layout.tensor > 1:
            shard(model, mesh.group("tensor"), sequence=layout.sequence)
        if layout.expert > 1:
            split_experts(model, mesh.group("expert"))
        if layout.pipeline > 1:
            from hanlin.parallel.pipeline import Pipeline  # three seconds of imports that nobody else needs

            self.pipeline = Pipeline(
                model, mesh.group("pipeline"), schedule=layout.schedule, chunks=layout.chunks, device=self.device,
                tokens=model.part.tokens.count if model.part is not None and model.part.tokens is not None else None,
            )  # fmt: skip
            model.score_elsewhere = self._score
        if layout.context > 1:
            self.context = ContextParallel(mesh.group("context"), layout.context_kind)
            self.context.attach(model)

    def replicate(self, model: Transformer) -> None:
        """Arrange how the gradients of the trainable parameters are summed over the replicas."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad or self.layout.shard == "zero3"}
        self._parts = {name: p.shape for name, p in named.items()}
        experts = expert_parameters(model) if self.layout.expert > 1 else set()
        alike = copies(model)
        elsewhere = self.pipeline.counted_elsewhere if self.pipeline else set()
        for axis, mine in (("replicas", named.keys() - experts), ("expert_replicas", named.keys() & experts)):
            part = {name: p for name, p in named.items() if name in mine}
            if not part:
                continue
            group, size = self.mesh.group(axis), self.mesh.size(axis)
            replicas = size
            if self.layout.shard != "none" and size > 1:
                zero = Zero(model, part, group, STAGES[self.layout.shard])
                self.replications.append(zero)
                self._shared[zero] = part.keys()
                self._sharers |= dict.fromkeys(part, group)
                replicas = 1
            else:
                self.replications.append(DataParallel(part, group))
            for name in part:
                self.shares[name] = 0.0 if name in elsewhere else 1.0 / (replicas * alike[name])
        # a rank of a pipeline may have nothing to train, and still takes part in the sums of the others
        self._alike = bool(self.shares) and all(share == 1.0 / self.world for share in self.shares.values())

    def exchange(self, model: Transformer) -> MatrixExchange | None:
        """What brings a matrix together whose numbers are spread over ranks; None where none are."""
        if self.layout.tensor == 1 and not self._sharers:
            return None
        matrices = [name for name, kind in self.kinds.items() if kind == "matrices" and name in self._parts]
        cuts = {name: cut for name in matrices if (cut := cut_of(model, name)) is not None}
        groups = {name: self._sharers[name] for name in matrices if name in self._sharers}
        return MatrixExchange(self._parts, self.ranges, groups, cuts, self.mesh.group("tensor"))

    def laid(self, model: Transformer) -> Laid:
        """How this rank's tensors sit in the whole model's, for checkpoints."""
        tensors: dict[str, Tensor] = dict(model_tensors(model))
        cuts = tensor_cuts(model.part)
        if self.layout.expert > 1:
            for name in expert_parameters(model):
                cut = expert_cut(model, name)
                assert cut is not None
                mine = Share(cut.dim, cut.pieces, cut.units, cut.start, cut.stop)
                cuts[name] = (*cuts.get(name, ()), mine)
        for replication, shared in self._shared.items():
            tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
            tensors |= replication.held
        spans = {name: found for zero in self._shared for name, found in zero.ranges.items()}
        elsewhere = self.pipeline.counted_elsewhere if self.pipeline else set()
        return Laid(tensors, self._shapes, cuts, spans, frozenset(elsewhere))

    @property
    def holds_all(self) -> bool:
        """Whether every process holds the whole model."""
        layout = self.layout
        return layout.tensor == layout.pipeline == layout.expert == 1 and layout.shard != "zero3"

    def close(self) -> None:
        """Take off what hangs in the model, so that another trainer may take it."""
        for replication in self.replications:
            replication.close()

    # --- one step ---

    def share(self, rows: int) -> tuple[int, int]:
        """Which of a step's rows are this rank's: [start, stop)."""
        index, size = self.mesh.index("data"), self.mesh.size("data")
        return index * rows // size, (index + 1) * rows // size

    def begin(self) -> None:
        """Before the first backward of a step."""
        for replication in self.replications:
            replication.begin()

    @contextmanager
    def last(self) -> Generator[None]:
        """Around the last micro-batch: what is summed over the replicas may leave while it is computed."""
        with ExitStack() as stack:
            for replication in self.replications:
                stack.enter_context(replication.last())
            yield

    def finish(self) -> None:
        """After the last backward: the gradients of the pieces are sums over the whole step."""
        for replication in self.replications:
            replication.finish()

    def publish(self) -> None:
        """After the optimiser."""
        for replication in self.replications:
            replication.publish()

    @contextmanager
    def whole(self) -> Generator[None]:
        """Every parameter that this rank holds is whole, and rows are read whole: for evaluation."""
        with ExitStack() as stack:
            if self.context is not None:
                stack.enter_context(self.context.paused())
            for replication in self.replications:
                stack.enter_context(replication.whole())
            yield

    @contextmanager
    def published(self, changed: AbstractContextManager[None]) -> Generator[None]:
        """Inside `changed`, which changes the pieces, the parameters follow; afterwards they are as before."""
        with changed:
            self.publish()
            yield
        self.publish()

    @property
    def pieces(self) -> dict[str, nn.Parameter]:
        """What the optimiser steps on."""
        return {name: piece for r in self.replications for name, piece in r.pieces.items()}

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Flat range of each piece in its parameter."""
        return {name: found for r in self.replications for name, found in r.ranges.items()}

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradient of the whole model, a scalar."""
        pieces = [(name, p.grad) for name, p in self.pieces.items() if p.grad is not None]
        if self._alike:  # every rank holds all of it
            return torch.nn.utils.get_total_norm([grad for _, grad in pieces])
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if pieces:
            norms = torch.stack(torch._foreach_norm([grad for _, grad in pieces])).double()
            shares = torch.tensor([self.shares[name] for name, _ in pieces], dtype=torch.float64, device=self.device)
            total = (norms.square() * shares).sum()
        dist.all_reduce(total)
        return total.sqrt()

    @torch.no_grad()
    def _score(self, batch: Batch) -> Tensor:
        """The loss of a batch that every rank of the pipeline has."""
        assert self.pipeline is not None

        def inputs(part: Batch) -> dict[str, Any]:
            return {"positions": part.positions, "mask": document_mask(part)}

        def score(model: Transformer, output: Output, part: Batch) -> Tensor:
            return token_loss(model, output.hidden, part.targets)

        return self.pipeline.evaluate([batch], inputs, score)

    # --- sums ---

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sum of the values over the ranks, in fp64."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Its sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_rows(self, values: Iterable[float]) -> list[float]:
        """Sum over the ranks of the data axis of what every rank of a replica counted alike."""
        return [value / self.layout.inner for value in self.sum(values)]

    def sum_loss(self, loss: Tensor) -> Tensor:
        """The loss of the step from the shares of the replicas."""
        if self.mesh.size("replicas") > 1:
            dist.all_reduce(loss, group=self.mesh.group("replicas"))
        return loss

    def sum_metrics(self, metrics: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """(sum, count) pairs over all tokens, by name; every rank gets them. Names may differ between ranks: of a
        pipeline only the last stage knows the loss. The ranks of a tensor group saw the same tokens: the first speaks.
        """
        if self.world == 1:
            return dict(metrics)
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, metrics if self.mesh.index("tensor") == 0 else {})
        total: dict[str, tuple[float, float]] = {}
        for mine in found:
            for name, (value, count) in mine.items():
                before = total.get(name, (0.0, 0.0))
                total[name] = before[0] + value, before[1] + count
        return total

    def agree(self, value: T) -> T:
        """Rank 0's value: of what each process measured for itself."""
        found: list[Any] = [value]
        if self.world > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Every rank takes over rank 0's values."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()
