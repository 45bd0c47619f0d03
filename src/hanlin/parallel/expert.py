"""Expert parallelism: each rank of a group keeps its share of every layer's experts, and tokens travel to them (GShard,
arXiv:2006.16668, section 3; DeepSpeed-MoE, arXiv:2201.05596, section 4).

    my tokens ─ router ─▶ (token, choice) pairs sorted by expert ─▶ all-to-all ─▶ rows of my experts, from all ranks
                                                                                          │ the experts
    my tokens ◀─ weighed sum of each token's rows ◀─ all-to-all ◀─────────────────────────┘

The ranks read different rows of a batch. Router, shared expert and everything else are whole on every rank, and their
gradients are summed by whoever sums over the ranks; the gradient of a rank's experts comes from all the group's tokens,
so inside the group it is not summed again. Works with capacity (what it drops is not sent), weights at the input,
biases, and over `parallel.tensor`: each expert's hidden units are cut by that, the experts by this.

Bytes a rank gives for one layer and pass, of E experts, width w, b bytes an activation, where it sends n rows (k for
each token, those to its own experts among them, those without a place not) and gets m; over the group n and m add up to
the same:

    forward     8 E for the counts (int64), n w b out, m w b back          3 calls
    backward    n w b out, m w b back                                      2 calls; 1 (n w b) if x has no gradient

A layer that is recomputed does its forward once more. Every rank of the group must run the same layers equally often,
with any number of tokens, none included.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.models.tensor_plan import Piece, share
from hanlin.models.transformer import Transformer
from hanlin.nn.experts import Compute, Dispatch, Experts
from hanlin.nn.routing import Routing
from hanlin.parallel.collectives import Group, all_gather, place


@torch.no_grad()
def split_experts(model: Transformer, group: Group = None) -> Transformer:
    """Leave this rank's experts in a model, in place; every rank of the group calls it with the same model.

    Rank r of n keeps the r-th n-th of every layer's experts. A split model cannot be saved as it is: `gather_experts`.
    `HanlinError` with the layer's name where the experts cannot be shared equally, and where there are none.
    """
    rank, ranks = place(group)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
    if not found:
        raise HanlinError("parallel.expert shares the experts of a model, and this one has none. Set it to 1.")
    for name, module in found:
        if module.exchange is not None:
            raise HanlinError(f"The experts of {name} are split already.")
        if module.count % ranks:
            raise HanlinError(f"parallel.expert: {name} has {module.count} experts, which {ranks} ranks cannot share.")
    if ranks == 1:
        return model
    for _, module in found:
        start, stop = share(module.count, rank, ranks)
        for parameter in module.parameters():
            parameter.data = parameter.data[start:stop].clone()
        module.exchange = Travel(rank, ranks, module.count, module.scale_input, group)
        module.count = stop - start
    model.register_state_dict_pre_hook(_refuse_saving)
    return model


def expert_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of which each rank of an expert group holds its own experts'."""
    return {f"{path}.{name}" for path, module in _split(model) for name, _ in module.named_parameters()}


def expert_cut(model: nn.Module, name: str) -> Piece | None:
    """Where what this rank holds of a parameter sits among all experts; None: it belongs to no split experts."""
    for path, module in _split(model):
        if name.startswith(f"{path}."):
            travel = module.exchange
            assert isinstance(travel, Travel)
            return Piece(0, 1, travel.count, travel.rank, travel.ranks)
    return None


@torch.no_grad()
def gather_experts(
    model: nn.Module, group: Group = None, *, of: Callable[[nn.Parameter], Tensor | None] = lambda p: p.detach()
) -> dict[str, Tensor]:
    """name of a parameter of split experts -> that of all experts, the same on every rank; all ranks call it.

    of: what is gathered of a parameter; None: nothing, on all ranks alike.
    """
    found = {}
    for path, module in _split(model):
        for name, parameter in module.named_parameters():
            if (mine := of(parameter)) is not None:
                found[f"{path}.{name}"] = all_gather(mine, group).flatten(0, 1)
    return found


class Travel:
    """How tokens reach the experts of a layer (`nn.experts.Exchange`), those of `count` that are not here, too."""

    def __init__(self, rank: int, ranks: int, count: int, scale_input: bool, group: Group) -> None:
        self.rank, self.ranks, self.count, self.scale_input, self.group = rank, ranks, count, scale_input, group

    def __call__(self, compute: Compute, x: Tensor, routing: Routing) -> Tensor:
        """x (tokens, width) of this rank -> (tokens, width)."""
        plan = Dispatch.of(routing, self.count)
        weights = routing.weights.to(x.dtype)
        rows = _Rows.apply(x, plan)  # (n, width), sorted by expert and so by rank
        if self.scale_input:
            rows = rows * weights.flatten()[plan.pair, None]
        arriving, sent, got = self._counts(plan)
        arrived = _Exchange.apply(rows, sent, got, self.group)  # (m, width), by rank, then by expert
        y = compute(arrived, self._here(arriving, arrived))
        back = _Exchange.apply(y, got, sent, self.group)  # (n, width)
        return _Combine.apply(back, None if self.scale_input else weights, plan) if len(x) else back

    def _counts(self, plan: Dispatch) -> tuple[Tensor, list[int], list[int]]:
        """(ranks, experts here): rows that arrive from each rank for each; how many go to and come from each rank."""
        ends = plan.offsets.long()
        leaving = ends.diff(prepend=ends.new_zeros(1))  # (count,)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.group)
        sent, got = torch.stack([leaving, arriving]).view(2, self.ranks, -1).sum(-1).tolist()  # a GPU's one wait
        return arriving.view(self.ranks, -1), sent, got

    def _here(self, arriving: Tensor, arrived: Tensor) -> Routing:
        """Each row that arrived goes through one expert, with weight 1."""
        experts = torch.arange(arriving.shape[1], device=arriving.device).repeat(self.ranks)
        expert = experts.repeat_interleave(arriving.flatten(), output_size=len(arrived))[:, None]  # (m, 1)
        ones = torch.ones(expert.shape, dtype=arrived.dtype, device=arrived.device)
        return Routing(ones, expert, ones, ones)


class _Rows(torch.autograd.Function):
    """x (tokens, width) -> the row of each pair (n, width); backward adds up those of a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad, plan = gradients[0], ctx.plan
        return plan.combine(grad.contiguous()) if len(plan.slot) else grad, None


class _Combine(torch.autograd.Function):
    """y (n, width), weights (tokens, k) or None for ones -> (tokens, width): the sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor | None, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y, weights)
        return plan.combine(y, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, weights = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        grad = gradients[0].index_select(0, plan.token)  # (n, width)
        if weights is None:
            return grad, None, None
        slope = None
        if ctx.needs_input_grad[1]:
            slope = torch.linalg.vecdot(grad, y)[plan.slot]  # (tokens, k)
            if plan.kept is not None:
                slope = slope * plan.kept
        return grad.mul_(weights.flatten()[plan.pair, None]), slope, None


class _Exchange(torch.autograd.Function):
    """x (sum of sent, width): its r-th run of rows goes to rank r -> (sum of got, width); backward they go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], got: list[int], group: Group) -> Tensor:
        ctx.how = sent, got, group
        return _all_to_all(x, sent, got, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sent, got, group = ctx.how
        return _all_to_all(gradients[0], got, sent, group), None, None, None


def _all_to_all(x: Tensor, sent: list[int], got: list[int], group: Group) -> Tensor:
    found = x.new_empty(sum(got), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), got, sent, group=group)
    return found


def _split(model: nn.Module) -> list[tuple[str, Experts]]:
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts)]
    return [(path, module) for path, module in found if module.exchange is not None]


def _refuse_saving(model: nn.Module, *_: Any) -> None:
    raise HanlinError(
        "This model's experts are split over ranks; it cannot be saved. `parallel.gather_experts` puts them together."
    )
