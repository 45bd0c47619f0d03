"""A model folder as the engine wants it: in the dtype that generates fastest here."""

import os

import torch

from hanlin.core.device import choose_device, choose_dtype
from hanlin.core.errors import HanlinError
from hanlin.models.folder import load_config, load_model
from hanlin.models.transformer import Transformer

SMALL = 6_000_000  # parameters
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def faster_dtype(model: Transformer) -> torch.dtype:
    """bf16 where the device is fast in it (CPU: measured), but fp32 for a small model on a CPU.

    bf16 reads half the bytes and pays a little for every operation. One Zen core, time of a decode step in bf16 over
    fp32, for 1 and 8 rows: 1.1M parameters 1.03, 0.99; 3.1M 0.91, 0.86; 10M 0.82, 0.82; 29M and 88M 0.70, 0.65 both.
    Below 6M the gain is not worth the rounding.
    It is a rule and no race at each start, because the same seed has to draw the same tokens tomorrow.
    """
    if model.device.type == "cpu" and model.parameter_count() < SMALL:
        return torch.float32
    return choose_dtype("auto", model.device)


def open_model(path: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", device: str = "auto") -> Transformer:
    """dtype: "float32", "bfloat16" …, or "auto" (`faster_dtype`)."""
    dtype = _named(dtype)
    target = choose_device(device)
    if isinstance(dtype, torch.dtype):
        return load_model(path, dtype=dtype, device=target)
    model = load_model(path, device=target)
    return model.to(faster_dtype(model))


def dtype_for(path: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> torch.dtype:
    """The dtype in which `open_model` would load a folder on a CPU."""
    dtype = _named(dtype)
    if isinstance(dtype, torch.dtype):
        return dtype
    small = load_config(path).parameters().total < SMALL
    return torch.float32 if small else choose_dtype("auto", torch.device("cpu"))


def _named(dtype: torch.dtype | str) -> torch.dtype | str:
    """A dtype for its name; "auto" stays."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise HanlinError(f"Unknown dtype `{dtype}`; it is one of: auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]
