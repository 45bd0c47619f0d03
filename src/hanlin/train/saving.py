"""What of a running training goes into a checkpoint, and how it comes back: tensors in place, the rest as JSON."""

import platform
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.train.chance import random_states, restore_random_states
from hanlin.train.checkpoint import Checkpoint
from hanlin.train.optim import Optimizer

RANDOM = "random/"  # prefix of torch's random states among the optimiser's tensors


@dataclass
class TrainState:
    """Where a run stands: what a checkpoint holds besides tensors.

    seconds: of training alone; time: of everything, over all tries; best: {"step", "eval/loss"}; last: the newest line
    of training and of evaluation together; meter: what was counted since the last line (`Meter.state`).
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    time: float = 0.0
    best: dict[str, float] | None = None
    last: dict[str, Any] | None = None
    meter: dict[str, Any] = field(default_factory=dict)


def take_checkpoint(model: nn.Module, optimizer: Optimizer, state: TrainState, about: dict[str, Any]) -> Checkpoint:
    """Everything that a resumed run needs, by reference (write it before the next step changes it).

    about: more JSON for its state, such as the run's identity.
    """
    chance, generators = random_states()
    values = {
        **asdict(state),
        **about,
        "random": chance,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    tensors = optimizer.state() | {RANDOM + name: tensor for name, tensor in generators.items()}
    return Checkpoint(values, model_tensors(model), tensors)


def put_back(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, *, chance: bool = True) -> TrainState:
    """Weights, optimiser and (if `chance`) random states as they were. Weights are copied in place: views of a buffer
    stay views."""
    restore_tensors(model, checkpoint.model)
    optimizer.load({name: t for name, t in checkpoint.optimizer.items() if not name.startswith(RANDOM)})
    if chance:
        generators = {n.removeprefix(RANDOM): t for n, t in checkpoint.optimizer.items() if n.startswith(RANDOM)}
        restore_random_states(checkpoint.state["random"], generators)
    return TrainState(**{name: checkpoint.state[name] for name in TrainState.__dataclass_fields__})


@contextmanager
def untouched(model: nn.Module, optimizer: Optimizer) -> Generator[None]:
    """Whatever is done inside, afterwards weights, optimiser and random states are what they were, bit for bit."""
    weights = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    chance = random_states()
    try:
        yield
    finally:
        restore_tensors(model, weights)
        optimizer.load(state)
        restore_random_states(*chance)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a shared parameter (a tied head) stands once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


@torch.no_grad()
def restore_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the model's own of the same names; a missing, extra or misshapen one is a `HanlinError`."""
    own = model_tensors(model)
    if own.keys() != tensors.keys():
        raise HanlinError(
            f"The checkpoint's weights differ from the model's: {sorted(own.keys() ^ tensors.keys())[:5]}."
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise HanlinError(
                f"{name} is {list(tensor.shape)} in the checkpoint, {list(own[name].shape)} in the model."
            )
        own[name].copy_(tensor)
