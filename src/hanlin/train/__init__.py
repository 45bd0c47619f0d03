"""The one training loop: `Trainer`, `Objective`s, optimisers, schedules, precision, checkpoints, monitors.

The names load on first use: reading a recipe needs `settings` and no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hanlin.train.objective import CausalLM, Objective
    from hanlin.train.settings import TrainSettings
    from hanlin.train.trainer import Trainer, TrainResult

_HOMES = {
    "CausalLM": "objective",
    "Objective": "objective",
    "TrainResult": "trainer",
    "TrainSettings": "settings",
    "Trainer": "trainer",
}

__all__ = ["CausalLM", "Objective", "TrainResult", "TrainSettings", "Trainer"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"hanlin.train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hanlin.train' has no attribute {name!r}")
