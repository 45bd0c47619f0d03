"""Mixture of experts: many feed-forwards, of which each token goes through a few.

    y(t) = sum over the k experts e that the router chose for t of weight(t, e) * down_e( act(gate_up_e x(t)) )
         + shared(x(t)), times sigmoid(g . x(t)) with a shared gate

Sparsely gated experts: arXiv:1701.06538. Shared and fine-grained ones: DeepSeekMoE, arXiv:2401.06066.

There is no loop over experts. The (token, choice) pairs are sorted by expert, so that each expert's rows lie together,
and each projection is one grouped product (`nn.grouped`):

    token   0 0 1 1 2 2        sorted by expert   1 2 0 2 0 1        slot: where each pair went
    expert  2 0 1 2 0 1   ->   0 0 1 1 2 2   ->   one product   ->   gather a token's k rows and add them up

The block has a backward of its own. It keeps x, the projection before the activation and the experts' outputs; the rows
sorted by expert and the activations are made again, which costs two cheap passes instead of two more stored matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hanlin.core.errors import HanlinError
from hanlin.nn.feed_forward import FeedForward, gate_function, swiglu
from hanlin.nn.grouped import grouped_outer, grouped_product
from hanlin.nn.linear import Linear
from hanlin.nn.routing import Router, RouterConfig, Routing


class MixtureOfExperts(nn.Module):
    """A router, `count` experts of `hidden` units, and one shared expert of `shared_hidden` units (0: none).

    activation, gated, limit: of every expert, as in `nn.feed_forward`; bias: of the routed experts' projections.
    scale_input: the router's weight scales what goes into an expert (Llama 4), not what comes out.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        count: int,
        router: RouterConfig,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        limit: float | None = None,
        shared_hidden: int = 0,
        shared_gate: bool = False,
        scale_input: bool = False,
    ) -> None:
        super().__init__()
        if shared_gate and not shared_hidden:
            raise HanlinError("`shared_gate` needs a shared expert: give `shared_hidden` too.")
        self.router = Router(width, count, router)
        self.experts = Experts(
            width, hidden, count, activation=activation, gated=gated, bias=bias, limit=limit, scale_input=scale_input
        )
        self.shared = FeedForward(width, shared_hidden, activation=activation, gated=gated) if shared_hidden else None
        self.shared_gate = Linear(width, 1, bias=False) if shared_gate else None

    def forward(self, x: Tensor, notes: list[Routing] | None = None) -> Tensor:  # (rows, T, width), or (T, width)
        """notes: the routing is appended, for the losses of `nn.balance`."""
        routing = self.router(x)
        if notes is not None:
            notes.append(routing)
        y = self.experts(x, routing)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * torch.sigmoid(self.shared_gate(x))
        return y + shared


Compute = Callable[[Tensor, Routing], Tensor]  # rows (n, width) and which of the experts here each goes through -> rows
Exchange = Callable[[Compute, Tensor, Routing], Tensor]


class Experts(nn.Module):
    """gate_up_proj (count, 2 * hidden, width), gate first, or without gate up_proj (count, hidden, width);
    down_proj (count, width, hidden); with `bias` also gate_up_proj_bias or up_proj_bias, and down_proj_bias.

    exchange: where `count` experts are here and others elsewhere (`parallel.expert`): it gets all tokens (n, width) and
    the routing over all experts, lets rows travel, and calls `compute` with those that came here.
    """

    exchange: Exchange | None = None

    def __init__(
        self,
        width: int,
        hidden: int,
        count: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        limit: float | None = None,
        scale_input: bool = False,
    ) -> None:
        super().__init__()
        self._activate = gate_function(activation, gated=gated, limit=limit)
        self._first = "gate_up_proj" if gated else "up_proj"
        self.count, self.scale_input = count, scale_input
        rows = 2 * hidden if gated else hidden
        self.register_parameter(self._first, nn.Parameter(torch.empty(count, rows, width)))
        self.register_parameter(f"{self._first}_bias", nn.Parameter(torch.empty(count, rows)) if bias else None)
        self.down_proj = nn.Parameter(torch.empty(count, width, hidden))
        self.register_parameter("down_proj_bias", nn.Parameter(torch.empty(count, width)) if bias else None)
        self.init_weights(width**-0.5)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Matrices normal, biases 0."""
        for parameter in self.parameters():
            _ = parameter.normal_(0.0, std) if parameter.dim() == 3 else parameter.zero_()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:  # (..., width) -> (..., width)
        rows = x.flatten(0, -2)
        y = self.compute(rows, routing) if self.exchange is None else self.exchange(self.compute, rows, routing)
        return y.view_as(x)

    def compute(self, x: Tensor, routing: Routing) -> Tensor:
        """x (tokens, width), routing over the `count` experts that are here -> (tokens, width)."""
        names = (self._first, "down_proj", f"{self._first}_bias", "down_proj_bias")
        parameters = [None if p is None else p.to(x.dtype) for p in (getattr(self, name) for name in names)]
        if not len(x):
            return _Idle.apply(x, *parameters)
        plan = Dispatch.of(routing, self.count)
        inputs: tuple[Any, ...] = (x, routing.weights.to(x.dtype), *parameters, plan, self._activate, self.scale_input)
        return _Experts.apply(*inputs) if torch.is_grad_enabled() else _run(*inputs)[0]

    def extra_repr(self) -> str:
        _, width, hidden = self.down_proj.shape
        return f"{self.count} x ({width} -> {hidden} -> {width}){', weighed at the input' if self.scale_input else ''}"


@dataclass(frozen=True)
class Dispatch:
    """The (token, choice) pairs sorted by expert; n of them have a place.

    pair (n,): number of the pair, token * k + choice; token (n,); expert (n,); offsets (count,) int32: end of each
    expert's rows; slot (tokens, k): the row of each pair; kept (tokens, k): as in `Routing`.
    """

    pair: Tensor
    token: Tensor
    expert: Tensor
    offsets: Tensor
    slot: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, routing: Routing, count: int) -> "Dispatch":
        experts, kept = routing.experts, routing.kept
        if kept is not None:
            experts = experts.masked_fill(~kept, -1)  # to the front
        expert, pair = experts.flatten().sort(stable=True)
        numbers = torch.arange(max(len(pair), count), device=pair.device)
        slot = torch.empty_like(pair).scatter_(0, pair, numbers[: len(pair)])
        offsets = torch.searchsorted(expert, numbers[:count], right=True)  # no bincount: it makes a GPU wait
        if kept is not None:
            dropped = int((~kept).sum())
            expert, pair, offsets = expert[dropped:], pair[dropped:], offsets - dropped
            slot = (slot - dropped).clamp_(min=0)  # a dropped pair reads row 0, times 0
        token = torch.div(pair, routing.experts.shape[1], rounding_mode="floor")
        return cls(pair, token, expert, offsets.to(torch.int32), slot.view_as(experts), kept)

    def combine(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """y (n, width), weights (tokens, k) or None for ones -> (tokens, width): the sum of each token's rows.

        An embedding bag reads the rows where they lie: 0.3 to 0.6 ms for 4096 rows of 1024, against 1.7 to 2.2 ms for a
        gather followed by a sum.
        """
        if self.kept is not None:
            weights = self.kept.to(y.dtype) if weights is None else weights * self.kept
        return F.embedding_bag(self.slot, y, mode="sum", per_sample_weights=weights)


Activate = Callable[[Tensor], Tensor]


def _run(
    x: Tensor,
    weights: Tensor,
    first: Tensor,
    down: Tensor,
    first_bias: Tensor | None,
    down_bias: Tensor | None,
    plan: Dispatch,
    activate: Activate,
    scale_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (tokens, width), what the activation gets (n, 2 * hidden), the experts' outputs (n, width)."""
    rows = x.index_select(0, plan.token)  # (n, width)
    if scale_input:
        rows *= weights.flatten()[plan.pair, None]
    h = grouped_product(rows, first.transpose(1, 2), plan.offsets)  # (n, 2 * hidden)
    del rows
    if first_bias is not None:
        h += first_bias.index_select(0, plan.expert)
    y = grouped_product(activate(h), down.transpose(1, 2), plan.offsets)  # (n, width)
    if down_bias is not None:
        y += down_bias.index_select(0, plan.expert)
    return plan.combine(y, None if scale_input else weights), h, y


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weights, first, down, _, _, plan, activate, scale_input = inputs
        out, h, y = _run(*inputs)
        y = y if ctx.needs_input_grad[1] and not scale_input else None
        ctx.plan, ctx.activate, ctx.scale_input = plan, activate, scale_input
        ctx.save_for_backward(x, weights, first, down, h, y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, first, down, h, y = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        need_x, need_weights, need_first, need_down, need_first_bias, need_down_bias = ctx.needs_input_grad[:6]
        weight = weights.flatten()[plan.pair, None]  # (n, 1)
        grad_weight = grad_first = grad_down = grad_first_bias = grad_down_bias = grad_x = None

        grad = gradients[0].index_select(0, plan.token)  # (n, width): of the experts' outputs
        if not ctx.scale_input:
            if need_weights:
                grad_weight = torch.linalg.vecdot(grad, y)  # (n,)
            grad.mul_(weight)
        if need_down_bias:
            grad_down_bias = _sum_by_expert(grad, plan)
        grad_a = grouped_product(grad, down, plan.offsets)  # (n, hidden)
        grad_h, a = _activation_slope(ctx.activate, h, grad_a)
        if need_down:
            grad_down = grouped_outer(grad, a, plan.offsets)
        del grad, grad_a, a
        if need_first_bias:
            grad_first_bias = _sum_by_expert(grad_h, plan)
        if need_first:
            rows = x.index_select(0, plan.token)
            grad_first = grouped_outer(grad_h, rows.mul_(weight) if ctx.scale_input else rows, plan.offsets)
            del rows
        if need_x or (need_weights and ctx.scale_input):
            grad_rows = grouped_product(grad_h, first, plan.offsets)  # (n, width)
            if ctx.scale_input:
                grad_weight = torch.linalg.vecdot(grad_rows, x.index_select(0, plan.token))
                grad_rows.mul_(weight)
            grad_x = plan.combine(grad_rows)
        if grad_weight is not None:
            grad_weight = grad_weight[plan.slot]  # (tokens, k)
            if plan.kept is not None:
                grad_weight *= plan.kept
        return grad_x, grad_weight, grad_first, grad_down, grad_first_bias, grad_down_bias, None, None, None


class _Idle(torch.autograd.Function):
    """No token came: nothing is computed, and the experts' gradients are zeros, not missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return gradients[0], *(torch.zeros_like(p) if need else None for p, need in needed)


def _activation_slope(activate: Activate, h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """h (n, 2 * hidden), grad (n, hidden; overwritten) of its activation -> gradient of h, the activation again."""
    if activate is not swiglu:
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            out = activate(leaf)
        return torch.autograd.grad(out, leaf, grad)[0], out.detach()
    gate, up = h.chunk(2, dim=-1)
    out = F.silu(gate)
    grad_h = torch.empty_like(h)
    grad_gate, grad_up = grad_h.chunk(2, dim=-1)
    torch.mul(grad, out, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return grad_h, out.mul_(up)


def _sum_by_expert(rows: Tensor, plan: Dispatch) -> Tensor:
    """(n, a) -> (count, a), summed in fp32 at least."""
    accurate = rows if rows.dtype == torch.float64 else rows.float()
    return accurate.new_zeros(len(plan.offsets), rows.shape[1]).index_add_(0, plan.expert, accurate).to(rows.dtype)
