"""Hanlin (翰林): one system for the whole life of a language model.

The names below are the front door; everything else is imported from its room (`hanlin.nn`, `hanlin.train`, ...).
They load on first use, so that `import hanlin` costs milliseconds and `hanlin --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hanlin.core.recipe import Recipe
    from hanlin.engine import Engine, SamplingParams
    from hanlin.models import load_model, save_model
    from hanlin.tokens import Tokenizer
    from hanlin.train import Trainer

_HOMES = {
    "load_model": "hanlin.models",
    "save_model": "hanlin.models",
    "Tokenizer": "hanlin.tokens",
    "Engine": "hanlin.engine",
    "SamplingParams": "hanlin.engine",
    "Trainer": "hanlin.train",
    "Recipe": "hanlin.core.recipe",
}

__all__ = ["Engine", "Recipe", "SamplingParams", "Tokenizer", "Trainer", "load_model", "save_model"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hanlin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
