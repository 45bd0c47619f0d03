"""The random states of Python, NumPy and torch, taken and put back: a resumed run draws what it would have drawn.

Python's and NumPy's are JSON, torch's are byte tensors.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON values, tensors) of the global generators; with the current CUDA device's where CUDA is in use."""
    version, words, gauss = random.getstate()
    numpy_state = dict(np.random.get_state(legacy=False))
    inner = dict(numpy_state["state"])
    inner["key"] = inner["key"].tolist()
    values = {"python": [version, list(words), gauss], "numpy": {**numpy_state, "state": inner}}
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return values, tensors


def restore_random_states(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put back what `random_states` gave."""
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    state = dict(values["numpy"])
    state["state"] = {**state["state"], "key": np.array(state["state"]["key"], dtype=np.uint32)}
    np.random.set_state(state)
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
