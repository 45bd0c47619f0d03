"""What the deep methods share: an observation as a vector, and a small perceptron."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.rl.episodes import Environment

Encode = Callable[[Sequence[Any]], Tensor]  # observations to (observations, size) float32


def observation_encoder(env: Environment) -> tuple[int, Encode]:
    """The size of an observation's vector and the function that makes it: one-hot of a number, an array flattened.

    Other observations (tuples, dictionaries, text) are a `HanlinError`.
    """
    space = env.observation_space
    shape = getattr(space, "shape", ())
    if hasattr(space, "n") and shape == ():
        first, rows = int(getattr(space, "start", 0)), torch.eye(int(space.n))
        return int(space.n), lambda states: rows[[int(state) - first for state in states]]
    if not shape or not hasattr(space, "low"):
        raise HanlinError(f"The observations of this environment are {space}; a network here takes numbers or arrays.")
    size = int(np.prod(shape))
    return size, lambda states: torch.from_numpy(np.asarray(states, dtype=np.float32).reshape(len(states), size))


def perceptron(sizes: Sequence[int], *, activation: type[nn.Module], last_gain: float) -> nn.Sequential:
    """Linear layers of these sizes with an activation between.

    last_gain: start orthogonal with biases of 0, gain sqrt 2 inside and this at the end (0.01 makes a policy start near
    uniform).
    """
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(itertools.pairwise(sizes), start=2):
        linear = nn.Linear(before, after)
        nn.init.orthogonal_(linear.weight, last_gain if number == len(sizes) else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])
