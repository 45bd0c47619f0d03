"""The one training loop: `Trainer`, `Objective`s, optimisers, schedules, precision, checkpoints, monitors."""

from hanlin.train.objective import CausalLM, Objective
from hanlin.train.settings import TrainSettings
from hanlin.train.trainer import Trainer

__all__ = ["CausalLM", "Objective", "TrainSettings", "Trainer"]
