"""Activations by the names that `config.json` uses, and gpt-oss's clamped gate.

relu           max(x, 0)
gelu           x Phi(x), Phi the normal distribution function        arXiv:1606.08415
gelu_new       its tanh form: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
quick_gelu     x sigmoid(1.702 x), its sigmoid form
silu, swish    x sigmoid(x)                                          arXiv:1710.05941
relu2          max(x, 0)^2                                           arXiv:2109.08668
selu           lambda (x if x > 0 else alpha (e^x - 1))              arXiv:1706.02515
"""

import math
from collections.abc import Callable
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError

Activation = Callable[[Tensor], Tensor]


def activation(name: str) -> Activation:
    """The function of a name; `HanlinError` names the nearest one and lists all."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    near = get_close_matches(name, ACTIVATIONS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise HanlinError(f"There is no activation {name!r}.{hint} Known are: {', '.join(sorted(ACTIVATIONS))}.")


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with tanh in the place of the error function (at most 5e-4 away): what GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")


def gelu_bloom(x: Tensor) -> Tensor:
    """The tanh form with sqrt(2/pi) rounded to eight digits, as BLOOM's code has it: 2e-10 away, which fp64 sees."""
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


def quick_gelu(x: Tensor) -> Tensor:
    """GELU with a logistic function in the place of the normal one (arXiv:1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (Primer, arXiv:2109.08668)."""
    return F.relu(x).square()


def identity(x: Tensor) -> Tensor:
    """Nothing: a gated layer with it is the bilinear one of arXiv:2002.05202."""
    return x


def clamped_swiglu(gate: Tensor, up: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """gpt-oss's gate (arXiv:2508.10925): with g = min(gate, limit) and u = max(-limit, min(up, limit)),

        (u + 1) g sigmoid(alpha g)

    gate and up of one shape -> like them. A clamped number passes no gradient, so that no unit runs away
    in low precision.
    """
    if not (limit > 0 and math.isfinite(limit)):
        raise HanlinError(f"The limit of a clamped SwiGLU is a positive number; found {limit}.")
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(alpha * gate))


ACTIVATIONS: dict[str, Activation] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_bloom": gelu_bloom,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "identity": identity,
    "linear": identity,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
