"""What weights begin as. Each function draws a new tensor of a shape from a generator; `initialise` fills a module.

    xavier      var = gain^2 * 2 / (fan_in + fan_out)             Glorot & Bengio 2010
    kaiming     var = gain^2 / fan                                arXiv:1502.01852
    GPT-2       std / sqrt(2 layers) for what writes into the residual stream
    DeepNorm    xavier with gain beta for feed-forward, value and output projections          arXiv:2203.00555
    pretrained  known tokens get their vectors, the others a draw with those vectors' mean and spread

A uniform draw of variance v lies within +- sqrt(3 v). A weight is (out, in): fan_in is its second dimension.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from hanlin.core.errors import HanlinError

Shape = tuple[int, ...]
Rule = Callable[[str, Tensor], Tensor | None]

# Names of what writes into the residual stream, and of what DeepNorm scales beside it.
RESIDUAL = ("o_proj", "down_proj")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
SCALED_BY_BETA = PROJECTIONS[2:]


def constant(shape: Shape, value: float) -> Tensor:
    """The same number everywhere."""
    return torch.full(shape, value)


def normal(shape: Shape, std: float, *, mean: float = 0.0, generator: Generator | None = None) -> Tensor:
    """N(mean, std^2)."""
    return _empty(shape, generator).normal_(mean, std, generator=generator)


def truncated_normal(
    shape: Shape,
    std: float,
    *,
    mean: float = 0.0,
    low: float = -2.0,
    high: float = 2.0,
    generator: Generator | None = None,
) -> Tensor:
    """N(mean, std^2) given that it lies within mean + low * std and mean + high * std.

    low and high count in standard deviations (torch's `a` and `b` are absolute: with std 0.02 a cut at 2 cuts nothing).
    Drawn through the inverse of the distribution function in fp64, so each number costs one draw and none is repeated.
    """
    if not -math.inf < low < high < math.inf or std < 0:
        raise HanlinError(f"A truncated normal needs finite low < high and std >= 0; found {low}, {high} and {std}.")
    below, above = (math.erf(x / math.sqrt(2)) for x in (low, high))
    u = _empty(shape, generator).double().uniform_(below, above, generator=generator)
    return (u.erfinv_() * math.sqrt(2)).clamp_(low, high).mul_(std).add_(mean).float()


def xavier_uniform(shape: Shape, *, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Keeps the variance in the middle between forward and backward."""
    return _uniform(shape, xavier_std(shape, gain), generator)


def xavier_normal(shape: Shape, *, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    return normal(shape, xavier_std(shape, gain), generator=generator)


def kaiming_uniform(
    shape: Shape,
    *,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: str = "relu",
    slope: float | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Keeps the variance through what follows the weight: `nonlinearity` is a name of `gain_of`. fan_in: of the values
    forward; fan_out: of the gradients backward. slope: of leaky_relu below 0."""
    return _uniform(shape, kaiming_std(shape, mode, nonlinearity, slope), generator)


def kaiming_normal(
    shape: Shape,
    *,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: str = "relu",
    slope: float | None = None,
    generator: Generator | None = None,
) -> Tensor:
    return normal(shape, kaiming_std(shape, mode, nonlinearity, slope), generator=generator)


def pretrained_embedding(tokens: int, ids: Tensor, vectors: Tensor, *, generator: Generator | None = None) -> Tensor:
    """An embedding (tokens, width) with vectors (n, width) at the rows ids (n,); every other row is drawn from a normal
    distribution with the mean and standard deviation that the vectors have in each dimension. Dtype of `vectors`."""
    known = ids.unique()
    if vectors.ndim != 2 or ids.shape != vectors.shape[:1] or len(known) != len(ids):
        raise HanlinError(
            f"Each known token needs one vector: found ids {tuple(ids.shape)}, of which {len(known)} differ, "
            f"and vectors {tuple(vectors.shape)}; expected (n,), all different, and (n, width)."
        )
    if len(known) and not 0 <= int(known[0]) <= int(known[-1]) < tokens:
        raise HanlinError(f"Ids lie from 0 to {tokens - 1}; found {int(known[0])} to {int(known[-1])}.")
    if len(known) < min(2, tokens):
        raise HanlinError(f"The spread of the other tokens is measured on 2 or more known ones; found {len(known)}.")
    std, mean = torch.std_mean(vectors.double(), 0, correction=min(1, len(known) - 1))
    drawn = _empty((tokens, vectors.shape[1]), generator).double().normal_(generator=generator)
    return drawn.to(vectors.device).mul_(std).add_(mean).to(vectors.dtype).index_copy_(0, ids, vectors)


# --- a whole module ---


@torch.no_grad()
def initialise(module: nn.Module, rule: Rule) -> int:
    """Fill each parameter with rule(its dotted name, itself); None leaves it. Returns how many were filled. A parameter
    shared under two names is asked for once, under the first."""
    filled = 0
    for name, parameter in module.named_parameters():
        value = rule(name, parameter)
        if value is not None:
            parameter.copy_(value)
            filled += 1
    return filled


def gpt2(std: float, layers: int, *, generator: Generator | None = None) -> Rule:
    """GPT-2: matrices N(0, std^2); those that write into the residual stream std / sqrt(2 layers), because 2 layers of
    them are summed there; biases 0. Vectors that are no bias (norms) stay."""

    def rule(name: str, parameter: Tensor) -> Tensor | None:
        if parameter.ndim < 2 or name.endswith("bias"):
            return torch.zeros_like(parameter) if name.endswith("bias") else None
        scale = depth_scale(layers) if _belongs(name, RESIDUAL) else 1.0
        return normal(tuple(parameter.shape), std * scale, generator=generator)

    return rule


def deepnorm(beta: float, *, generator: Generator | None = None) -> Rule:
    """DeepNorm: projections xavier-normal, with gain beta (`nn.norms.deepnorm_constants`) for feed-forward, value and
    output, with 1 for query and key; their biases 0. What is no projection stays."""

    def rule(name: str, parameter: Tensor) -> Tensor | None:
        if not _belongs(name, PROJECTIONS):
            return None
        if parameter.ndim < 2 or name.endswith("bias"):
            return torch.zeros_like(parameter)
        gain = beta if _belongs(name, SCALED_BY_BETA) else 1.0
        shape = tuple(parameter.shape)  # of experts (count, ..., ...): each is a matrix of its own
        return normal(shape, xavier_std(shape[-2:], gain), generator=generator)

    return rule


# --- the numbers behind them ---


def depth_scale(layers: int) -> float:
    """1 / sqrt(2 layers): a layer adds to the residual stream twice."""
    if layers < 1:
        raise HanlinError(f"A depth-scaled initialisation needs at least one layer; found {layers}.")
    return (2 * layers) ** -0.5


def fans(shape: Shape) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight (out, in, ...): further dimensions are a receptive field that multiplies both."""
    if len(shape) < 2:
        raise HanlinError(f"Fan-in and fan-out need a weight of two dimensions or more, (out, in); found {shape}.")
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def gain_of(nonlinearity: str, slope: float | None = None) -> float:
    """By how much a nonlinearity shrinks the standard deviation of N(0, 1), undone: sqrt(2) for ReLU, which halves it.
    slope: of leaky_relu below 0 (None: 0.01)."""
    if nonlinearity == "leaky_relu":
        return math.sqrt(2 / (1 + (0.01 if slope is None else slope) ** 2))
    if slope is not None:
        raise HanlinError(f"`slope` belongs to leaky_relu; the nonlinearity is {nonlinearity!r}.")
    if nonlinearity not in GAINS:
        raise HanlinError(f"No gain is known for {nonlinearity!r}. Known are: {', '.join([*GAINS, 'leaky_relu'])}.")
    return GAINS[nonlinearity]


def xavier_std(shape: Shape, gain: float = 1.0) -> float:
    return gain * math.sqrt(2 / sum(fans(shape)))


def kaiming_std(shape: Shape, mode: str = "fan_in", nonlinearity: str = "relu", slope: float | None = None) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise HanlinError(f"Kaiming's mode is fan_in or fan_out; found {mode!r}.")
    return gain_of(nonlinearity, slope) / math.sqrt(fans(shape)[mode == "fan_out"])


def _uniform(shape: Shape, std: float, generator: Generator | None) -> Tensor:
    bound = math.sqrt(3) * std
    return _empty(shape, generator).uniform_(-bound, bound, generator=generator)


def _empty(shape: Shape, generator: Generator | None) -> Tensor:
    """fp32, where the generator lives."""
    return torch.empty(shape, device=None if generator is None else generator.device)


def _belongs(name: str, modules: tuple[str, ...]) -> bool:
    """`model.layers.0.mlp.up_proj.weight` belongs to `up_proj`, and so does `mlp.experts.up_proj`."""
    return any(part in modules for part in name.split(".")[-2:])


GAINS = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 3 / 4}
