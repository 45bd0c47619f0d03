"""What of a running training goes into a checkpoint, and how it comes back: tensors in place, the rest as JSON."""

import platform
import time
from collections.abc import Generator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.models.tensor_plan import Cut, Part, share
from hanlin.train.chance import random_states, restore_random_states
from hanlin.train.checkpoint import Checkpoint
from hanlin.train.optim import Optimizer
from hanlin.train.reader import AVERAGE, BALANCE, MOMENTS, RANDOM, WEIGHTS, CheckpointReader
from hanlin.train.sharded import Held, Shape, Share, Span


@dataclass
class TrainState:
    """Where a run stands: what a checkpoint holds besides tensors.

    seconds: of training alone; time: of everything, over all tries; best: {"step", "eval/loss"}; last: the newest line
    of training and of evaluation together; meter: what was counted since the last line (`Meter.state`); loss_scale,
    spikes, source: what these remember.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    time: float = 0.0
    best: dict[str, float] | None = None
    last: dict[str, Any] | None = None
    meter: dict[str, Any] = field(default_factory=dict)
    loss_scale: dict[str, float] = field(default_factory=dict)
    spikes: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Laid:
    """This rank's tensors and how each sits in the whole model's (`train.sharded`).

    tensors: by name, what is saved and put back: this rank's share where ZeRO shares a parameter, else the parameter;
    persistent buffers. shapes: of every tensor of the whole model, those of other ranks too. cuts: what tensor and
    expert parallelism left of a tensor. spans: of the shares of ZeRO. elsewhere: names that another rank saves: a tied
    embedding stands in the first and the last stage of a pipeline.
    """

    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, Shape]
    cuts: Mapping[str, tuple[Share, ...]] = field(default_factory=dict)
    spans: Mapping[str, Span] = field(default_factory=dict)
    elsewhere: Set[str] = frozenset()

    @classmethod
    def whole(cls, model: nn.Module) -> "Laid":
        """Of a rank that holds all of the model."""
        tensors = model_tensors(model)
        return cls(tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()})

    def held(self, prefix: str, tensors: Mapping[str, Tensor]) -> list[Held]:
        """Tensors that belong to the model's, "NAME" or "NAME/KEY", ready to be saved as prefix + name.

        One that has the shape of the tensor it belongs to sits as that one does; a scalar, and what belongs to a tensor
        that is whole here, is whole. Anything else is a `HanlinError`: nobody could put its pieces together.
        """
        return [self._held(prefix, path, tensor.detach()) for path, tensor in tensors.items()]

    def saved(self, prefix: str, tensors: Mapping[str, Tensor]) -> list[Held]:
        """As `held`, without what another rank saves."""
        mine = {path: tensor for path, tensor in tensors.items() if not self._is_elsewhere(path)}
        return self.held(prefix, mine)

    def _is_elsewhere(self, path: str) -> bool:
        return path in self.elsewhere or path.rpartition("/")[0] in self.elsewhere

    def moments(self, reader: CheckpointReader, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's pieces of the optimiser's tensors, "NAME/KEY", for the parameters `names` that it steps on."""
        found = {}
        for saved in reader.names(MOMENTS):
            path = saved.removeprefix(MOMENTS)
            name = path.rpartition("/")[0]
            if name not in self.shapes:
                raise HanlinError(
                    f"The optimiser's state holds {path!r}, but the model has no such trainable parameter."
                )
            if name not in names and name in self.tensors:
                raise HanlinError(f"The optimiser's state holds {path!r}, but {name} is not trained now.")
            if name in names:
                found[path] = self._piece(reader, saved, name)
        return found

    def _held(self, prefix: str, path: str, tensor: Tensor) -> Held:
        name = path if path in self.tensors else path.rpartition("/")[0]
        cuts, span = self.cuts.get(name, ()), self.spans.get(name)
        if name in self.tensors and tensor.shape == self.tensors[name].shape:
            return Held(prefix + path, tensor, tuple(self.shapes[name]), cuts, span)
        if tensor.ndim and (cuts or span is not None):
            raise HanlinError(
                f"{path} is {list(tensor.shape)}, its parameter {list(self.tensors[name].shape)} is a part of one that "
                "several ranks share: such a state cannot be saved. Choose an optimiser whose state has the shape of "
                "its parameter, or a layout that leaves parameters whole."
            )
        return Held(prefix + path, tensor, tuple(tensor.shape))

    def _piece(self, reader: CheckpointReader, saved: str, name: str) -> Tensor:
        cuts, span = self.cuts.get(name, ()), self.spans.get(name)
        if reader.shape(saved) == tuple(self.shapes[name]):
            return reader.piece(saved, cuts, span)
        if reader.shape(saved) and (cuts or span is not None):
            raise HanlinError(
                f"{saved} is {list(reader.shape(saved))} in the checkpoint: it cannot be cut for this layout, which "
                f"leaves a part of {name} to each rank. Continue with the layout that wrote it."
            )
        return reader.whole(saved)


def tensor_cuts(part: Part | None) -> dict[str, tuple[Share, ...]]:
    """How the tensors of a model that was cut by `parallel.shard` sit in the whole one (`model.part`)."""
    if part is None:
        return {}
    return {
        name: (Share(layout.dim, layout.pieces, units, *share(units, part.rank, part.ranks)),)
        for name, (layout, units) in part.layouts.items()
        if isinstance(layout, Cut)
    }


def take_checkpoint(
    laid: Laid,
    optimizer: Optimizer,
    state: TrainState,
    about: dict[str, Any],
    *,
    average: Mapping[str, Tensor] | None = None,
    balance: Mapping[str, Tensor] | None = None,
    first: bool = True,
) -> Checkpoint:
    """Everything that a resumed run needs, by reference (save it before the next step changes it).

    about: more JSON for its state, such as the run's identity. average: running averages of the weights, by name.
    balance: what is remembered of each router. first: whether this is the process whose random states are kept.
    """
    chance, generators = random_states()
    values = {
        **asdict(state),
        **about,
        "random": chance,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    held = [
        *laid.saved(WEIGHTS, laid.tensors),
        *laid.saved(MOMENTS, optimizer.state()),
        *laid.saved(AVERAGE, average or {}),
        *(Held(RANDOM + name, tensor, tuple(tensor.shape)) for name, tensor in generators.items() if first),
        *(Held(BALANCE + name, tensor, tuple(tensor.shape)) for name, tensor in (balance or {}).items()),
    ]
    return Checkpoint(values, held)


def put_back(reader: CheckpointReader, laid: Laid, optimizer: Optimizer, *, chance: bool = True) -> TrainState:
    """Weights, optimiser and (if `chance`) random states as they were, in whatever layout they are now. Weights are
    copied in place: views of a buffer stay views. Where ZeRO shares them, the caller publishes them afterwards."""
    put_weights(reader, laid)
    optimizer.load(laid.moments(reader, optimizer.names))
    if chance:
        generators = {name.removeprefix(RANDOM): reader.whole(name) for name in reader.names(RANDOM)}
        restore_random_states(reader.state["random"], generators)
    known = {name: reader.state[name] for name in TrainState.__dataclass_fields__ if name in reader.state}
    return TrainState(**known)


def put_weights(reader: CheckpointReader, laid: Laid) -> None:
    """Copy this rank's pieces of the weights into its tensors; a missing, extra or misshapen one is a `HanlinError`."""
    saved = {name.removeprefix(WEIGHTS) for name in reader.names(WEIGHTS)}
    if saved != laid.shapes.keys():
        raise HanlinError(
            f"The checkpoint's weights differ from the model's: {sorted(saved ^ laid.shapes.keys())[:5]}."
        )
    for held in laid.held(WEIGHTS, laid.tensors):
        reader.put(held)


def average_of(reader: CheckpointReader, laid: Laid, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's pieces of the saved averages, for those it holds now; what it counts besides is whole."""
    missing = sorted(name for name in averages if AVERAGE + name not in reader.names(AVERAGE))
    if missing:
        raise HanlinError(f"The checkpoint {reader.folder} holds no average of {missing[0]}; it cannot be continued.")
    return {
        name: laid._piece(reader, AVERAGE + name, name) if name in laid.shapes else reader.whole(AVERAGE + name)
        for name in averages
    }


def balance_of(reader: CheckpointReader, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is remembered of this rank's routers; as it is where the checkpoint says nothing."""
    saved = set(reader.names(BALANCE))
    return {name: reader.whole(BALANCE + name) if BALANCE + name in saved else now for name, now in wanted.items()}


@contextmanager
def untouched(laid: Laid, optimizer: Optimizer) -> Generator[None]:
    """Whatever is done inside, afterwards weights, optimiser and random states are what they were, bit for bit. Where
    ZeRO shares the weights, the caller publishes them afterwards."""
    weights = {name: tensor.clone() for name, tensor in laid.tensors.items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    chance = random_states()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in weights.items():
                laid.tensors[name].detach().copy_(tensor)
        optimizer.load(state)
        restore_random_states(*chance)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a shared parameter (a tied head) stands once."""
    seen: set[int] = set()
    found = {}
    for prefix, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or id(tensor) in seen or name in module._non_persistent_buffers_set:
                continue
            seen.add(id(tensor))
            found[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return found
