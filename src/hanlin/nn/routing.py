"""Which experts a token goes to, and with what weights.

A router gives each token a logit an expert, z = W x (+ b), and picks k experts:

    softmax       s = softmax(z); the k largest                 Mixtral, Qwen2/3-MoE, DeepSeek-V2, Switch, GShard
    topk_softmax  the k largest z; softmax over these alone     gpt-oss (equal to softmax, renormalised)
    sigmoid       s = sigmoid(z); the k largest s + correction  DeepSeek-V3; Llama 4 (k = 1, no correction)

    weight = s of the chosen, divided by their sum (`renormalise`), times `scale`

- Groups (DeepSeek-V2, arXiv:2405.04434; V3, arXiv:2412.19437): experts lie in `groups` equal groups; a token may only
  choose inside its `top_groups` best ones, judged by their largest score or by the sum of their two largest.
- Correction (arXiv:2408.15664): a bias an expert that is added for choosing and not for weighing. No gradient moves it;
  `update_correction` pushes it up where an expert has too few tokens. It balances without a loss.
- Capacity (Switch, arXiv:2101.03961, eq. 3; GShard, arXiv:2006.16668): an expert takes so many tokens of a row, first
  come first served, all first choices before all second ones. A token that finds no place gets zeros from that expert.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.nn.wide import wide


@dataclass(frozen=True)
class RouterConfig:
    """top_k: experts a token; kind, renormalise, scale: the table above.

    bias: of the logits. wide: the logits themselves are fp32, not only what follows them (DeepSeek, Switch).
    groups, top_groups, group_score: choose inside the best groups (1 group: everywhere). correction: of the choice.
    capacity: tokens of a row that an expert takes; or capacity_factor: that many times its even share, rounded up.
    jitter: in training the router sees x times uniform(1 - jitter, 1 + jitter) (Switch, section 2.4).
    """

    top_k: int
    kind: Literal["softmax", "topk_softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    bias: bool = False
    wide: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    correction: bool = False
    capacity: int | None = None
    capacity_factor: float | None = None
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "topk_softmax", "sigmoid"):
            raise HanlinError(f"Unknown router {self.kind!r}; it is one of: softmax, topk_softmax, sigmoid.")
        if self.group_score not in ("max", "top2"):
            raise HanlinError(f"Unknown group score {self.group_score!r}; it is one of: max, top2.")
        if self.top_k < 1:
            raise HanlinError(f"A router chooses at least one expert; `top_k` is {self.top_k}.")
        if not 1 <= self.top_groups <= self.groups:
            raise HanlinError(f"`top_groups` must lie in 1 … `groups` ({self.groups}); it is {self.top_groups}.")
        if self.kind == "topk_softmax" and (not self.renormalise or self.groups > 1 or self.correction):
            raise HanlinError(
                "The router `topk_softmax` is always renormalised, without groups and correction; `softmax` has them."
            )
        if self.capacity is not None and self.capacity_factor is not None:
            raise HanlinError("Give `capacity` or `capacity_factor`, not both.")
        if self.capacity is not None and self.capacity < 1:
            raise HanlinError(f"`capacity` must be at least 1 token; it is {self.capacity}.")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise HanlinError(f"`capacity_factor` must be positive; it is {self.capacity_factor}.")
        if not 0 <= self.jitter < 1:
            raise HanlinError(f"`jitter` must be at least 0 and below 1; it is {self.jitter}.")

    def check(self, experts: int) -> None:
        """`HanlinError` where this router cannot serve so many experts."""
        if experts % self.groups:
            raise HanlinError(f"{experts} experts cannot be cut into {self.groups} equal groups.")
        reach = experts // self.groups * self.top_groups
        if self.top_k > reach:
            raise HanlinError(f"A token cannot go to {self.top_k} experts: it may choose among {reach}.")
        if self.groups > 1 and self.group_score == "top2" and experts < 2 * self.groups:
            raise HanlinError(f"Groups judged by their two best experts hold two at least; {experts} in {self.groups}.")

    def places(self, tokens: int, experts: int) -> int | None:
        """How many of a row's tokens an expert takes; None: all."""
        if self.capacity_factor is None:
            return self.capacity
        return math.ceil(self.capacity_factor * self.top_k * tokens / experts)


@dataclass(frozen=True)
class Routing:
    """What a router decided for `tokens` tokens.

    weights (tokens, k) fp32 or fp64; experts (tokens, k) int64; logits (tokens, experts); scores (tokens, experts):
    softmax or sigmoid of all logits, fp32 or fp64; kept (tokens, k) bool: False where the expert had no place; None: no
    capacity is set.
    """

    weights: Tensor
    experts: Tensor
    logits: Tensor
    scores: Tensor
    kept: Tensor | None = None


class Router(nn.Module):
    """weight (experts, width), bias (experts,) if `config.bias`, correction (experts,) if `config.correction`.

    The correction is a buffer that stays in fp32 whatever the module is cast to: its steps are smaller than bf16's.
    """

    bias: Tensor | None
    correction: Tensor | None

    def __init__(self, width: int, experts: int, config: RouterConfig) -> None:
        super().__init__()
        config.check(experts)
        self.config = config
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.bias = nn.Parameter(torch.empty(experts)) if config.bias else None
        self.register_buffer("correction", torch.zeros(experts) if config.correction else None)
        self.init_weights(width**-0.5)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Weight normal, bias and correction 0: a router begins nearly even."""
        self.weight.normal_(0.0, std)
        for start_at_zero in (self.bias, self.correction):
            if start_at_zero is not None:
                start_at_zero.zero_()

    def forward(self, x: Tensor) -> Routing:  # (rows, T, width), or (T, width): one row
        config = self.config
        if config.jitter and self.training:
            x = x * torch.empty_like(x).uniform_(1 - config.jitter, 1 + config.jitter)
        if config.wide:
            x = wide(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        logits = F.linear(x, self.weight.to(x.dtype), bias)  # (rows, T, experts)
        routing = route(logits.flatten(0, -2), config, self.correction)
        places = config.places(x.shape[-2], len(self.weight))
        if places is None:
            return routing
        rows = routing.experts.view(-1, x.shape[-2], config.top_k)  # (rows, T, k)
        kept = find_places(rows, len(self.weight), places).flatten(0, 1)
        return Routing(routing.weights, routing.experts, routing.logits, routing.scores, kept)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.config.top_k} of {len(self.weight)}, {self.config.kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        before = self.correction
        super()._apply(fn, recurse)
        after = self.correction
        if before is not None and after is not None and after.dtype in (torch.bfloat16, torch.float16):
            self.correction = after.float() if before.is_meta else before.to(after.device)
        return self


def route(logits: Tensor, config: RouterConfig, correction: Tensor | None = None) -> Routing:
    """logits (tokens, experts), correction (experts,) -> Routing, before capacity; fp32 at least.

    The chosen stand in descending order of what they were chosen by. The correction gets no gradient.
    """
    z, k = wide(logits), config.top_k
    if config.kind == "topk_softmax":
        top, experts = z.topk(k, dim=-1)
        return Routing(top.softmax(-1) * config.scale, experts, logits, z.softmax(-1))
    scores = z.softmax(-1) if config.kind == "softmax" else z.sigmoid()
    with torch.no_grad():
        # sigmoid(17) and sigmoid(18) are both 1 in fp32: without a correction the logits choose.
        choice = z if config.kind == "sigmoid" and correction is None and config.groups == 1 else scores
        if correction is not None:
            choice = choice + correction
        if config.groups > 1:
            choice = _inside_best_groups(choice, config)
        experts = choice.topk(k, dim=-1).indices  # (tokens, k)
    weights = scores.gather(1, experts)
    if config.renormalise:
        total = weights.sum(-1, keepdim=True)
        # sigmoids can all be 0, a softmax's k largest cannot
        weights = weights / (total + 1e-20 if config.kind == "sigmoid" else total)
    return Routing(weights if config.scale == 1.0 else weights * config.scale, experts, logits, scores)


def find_places(experts: Tensor, count: int, places: int) -> Tensor:
    """experts (rows, T, k) among `count` -> bool (rows, T, k): the token is among the first `places` that its row sends
    there. All first choices of a row are served before its second choices (GShard, algorithm 1)."""
    rows, length, k = experts.shape
    queue = experts.transpose(1, 2).reshape(rows, k * length)  # first choices, then second ones
    arrived = F.one_hot(queue, count).cumsum(1)  # (rows, k T, count)
    place = arrived.gather(2, queue[..., None])[..., 0]  # from 1
    return (place <= places).view(rows, k, length).transpose(1, 2)


@torch.no_grad()
def update_correction(correction: Tensor, load: Tensor, rate: float) -> Tensor:
    """One step of balancing without a loss (arXiv:2408.15664, algorithm 1): correction + rate * sign(mean load - load).

    correction (experts,), load (experts,): tokens each expert got in the step, over all ranks -> the new correction.
    """
    if correction.shape != load.shape:
        raise HanlinError(f"A load of shape {list(load.shape)} does not fit a correction of {list(correction.shape)}.")
    load = load.to(torch.float64)
    return correction + rate * torch.sign(load.mean() - load).to(correction.dtype)


def _inside_best_groups(choice: Tensor, config: RouterConfig) -> Tensor:
    """choice (tokens, experts) -> the same, -inf outside each token's best groups."""
    grouped = choice.view(len(choice), config.groups, -1)  # (tokens, groups, experts of a group)
    quality = grouped.amax(-1) if config.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    best = quality.topk(config.top_groups, dim=-1).indices
    outside = torch.ones_like(quality, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(outside[..., None], -math.inf).flatten(1)
