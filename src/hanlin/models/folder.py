"""A model is a folder in the Hugging Face layout: what transformers saved loads here, what is saved here loads there."""

import os
from typing import Literal

import torch

from hanlin.models.config import ModelConfig
from hanlin.models.transformer import Transformer


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """`config.json` of a model folder as a `ModelConfig`. An unknown family or a setting that this Transformer cannot
    honour is a `HanlinError` that names it."""
    raise NotImplementedError


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str | torch.device = "auto",
) -> Transformer:
    """The model in `path`, in evaluation mode. dtype "auto": as saved. device "auto": CUDA if there is one, else CPU.

    A missing, superfluous or wrongly shaped weight is a `HanlinError` with its name.
    """
    raise NotImplementedError


def save_model(model: Transformer, path: str | os.PathLike[str]) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` into folder `path`, each atomically."""
    raise NotImplementedError
