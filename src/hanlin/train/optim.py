"""Which parameter gets which optimiser, and the step over all of them.

    matrices     weights of two dimensions that are neither embedding nor output head; stacks of them (experts)
    head         the output head, where it is not the embedding itself
    embeddings   lookup tables
    vectors      norms, biases and what else there is

Matrices and head decay (embeddings if asked). Muon takes the matrices and leaves the rest to AdamW, in 8 bits a state
the matrices and head alone: where they are few, states are small (arXiv:2110.02861, section 2.3).

Ranks that share parameters step on pieces of them. AdamW and SGD work element by element and do not mind; Muon brings
matrices together by an `Exchange`; Adafactor needs whole tensors and refuses pieces.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.models.tensor_plan import Cut
from hanlin.nn.experts import Experts
from hanlin.train import choices
from hanlin.train.adafactor import Adafactor
from hanlin.train.choices import OptimizerChoice
from hanlin.train.eight_bit import AdamW8bit
from hanlin.train.muon import Exchange, Muon
from hanlin.train.mup import Scale, split_by_scale

Named = dict[str, nn.Parameter]
Kind = Literal["matrices", "head", "embeddings", "vectors"]


@dataclass(frozen=True)
class ParameterGroups:
    """Trainable parameters by kind, each by name; a shared one (tied embeddings) stands once."""

    matrices: Named
    head: Named
    embeddings: Named
    vectors: Named

    def all(self) -> Named:
        return self.matrices | self.head | self.embeddings | self.vectors


def parameter_kinds(model: nn.Module) -> dict[str, Kind]:
    """The kind of each trainable parameter by name. Of a model as it was built: before ranks share its parameters."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    stacks = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    head = getattr(model, "lm_head", None)
    kinds: dict[str, Kind] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            kinds[name] = "embeddings"
        elif head is not None and parameter is head.weight:
            kinds[name] = "head"
        elif name.endswith("bias"):  # of an expert or a head it has two dimensions, and is no matrix
            kinds[name] = "vectors"
        else:
            matrix = parameter.ndim == 2 or (parameter.ndim == 3 and id(parameter) in stacks)
            kinds[name] = "matrices" if matrix else "vectors"
    return kinds


def group_parameters(model: nn.Module, kinds: Mapping[str, Kind] | None = None) -> ParameterGroups:
    """Sort the trainable parameters of `model` into the four kinds. kinds: as `parameter_kinds` found them earlier."""
    kinds = parameter_kinds(model) if kinds is None else kinds
    found: dict[Kind, Named] = {"matrices": {}, "head": {}, "embeddings": {}, "vectors": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[kinds[name]][name] = parameter
    return ParameterGroups(**found)


class Optimizer:
    """One or more `torch.optim` optimisers stepped as one, with a state of named tensors.

    parts: their groups carry `peak`, the rate at factor 1. names: every parameter (or piece of one) by name.
    """

    def __init__(self, parts: list[torch.optim.Optimizer], names: Named) -> None:
        self.parts, self.names = parts, names

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak rates. Parameters without a gradient are left alone."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * factor
            part.step()

    def state(self) -> dict[str, Tensor]:
        """{"NAME/exp_avg": tensor, ...}: everything that the next step depends on besides weights and rate."""
        found = {}
        for part in self.parts:
            owned = {id(p) for group in part.param_groups for p in group["params"]}
            for name, parameter in self.names.items():
                if id(parameter) in owned:
                    state = part.state.get(parameter, {}).items()
                    found.update({f"{name}/{key}": value for key, value in state if value is not None})
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state that `state` gave (copied to each parameter's device)."""
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            name, _, key = path.rpartition("/")
            if name not in self.names:
                raise HanlinError(
                    f"The optimiser's state holds {path!r}, but the model has no such trainable parameter."
                )
            by_parameter.setdefault(name, {})[key] = tensor.to(self.names[name].device, copy=True)
        for part in self.parts:
            part.state.clear()
            owned = {id(p) for group in part.param_groups for p in group["params"]}
            for name, state in by_parameter.items():
                if id(self.names[name]) in owned:
                    part.state[self.names[name]] = state


def build_optimizer(
    model: nn.Module,
    choice: OptimizerChoice,
    lr: float,
    *,
    dtype: torch.dtype | None = None,
    pieces: Mapping[str, nn.Parameter] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    exchange: Exchange | None = None,
    scales: Mapping[str, Scale] | None = None,
) -> Optimizer:
    """The optimiser of a recipe over the trainable parameters of `model` (already on its device).

    dtype: of Muon's products (None: the parameters'). AdamW and SGD are torch's fused ones on CPU and CUDA.
    pieces: what to step on, by name, where that is not the parameters themselves (flat shares of ZeRO); a name that is
    missing has no share here. kinds: of `parameter_kinds`, before the model was laid over ranks. exchange: brings
    pieces of matrices together, for Muon. scales: factors of muP, for AdamW. `HanlinError` names what is not whole
    where the optimiser needs it to be.
    """
    whole = group_parameters(model, kinds)
    if not (whole.all() if kinds is None else kinds):
        raise HanlinError("The model has no trainable parameter: every one has requires_grad=False.")
    if pieces is None:
        groups = whole
    else:
        mine = [
            {name: pieces[name] for name in kind if name in pieces}
            for kind in (whole.matrices, whole.head, whole.embeddings, whole.vectors)
        ]
        groups = ParameterGroups(*mine)
    parts: list[torch.optim.Optimizer | None]
    match choice:
        case choices.AdamW():
            parts = _build_adamw(groups, choice, lr, scales)
        case choices.Muon():
            if exchange is None:
                _refuse_pieces("muon", model, groups.matrices, whole.matrices)
            parts = _build_muon(whole, groups, choice, lr, dtype, exchange)
        case choices.SGD():
            parts = [_build_sgd(groups, choice, lr)]
        case choices.Adafactor():
            _refuse_pieces("adafactor", model, groups.all(), whole.all())
            parts = [_build_adafactor(groups, choice, lr)]
    return Optimizer([part for part in parts if part is not None], groups.all())


def clip_gradients(parameters: Iterable[Tensor], norm: float, limit: float | None) -> None:
    """Scale all gradients so that their global norm `norm` (see `gradient_norm`) becomes at most `limit`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if limit is not None and norm > limit and gradients:
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients together, a scalar on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _group(parameters: Iterable[nn.Parameter], peak: float, decay: float, **more: Any) -> list[dict[str, Any]]:
    members = list(parameters)
    return [{"params": members, "peak": peak, "lr": peak, "weight_decay": decay, **more}] if members else []


def _build_adamw(
    groups: ParameterGroups, choice: choices.AdamW, lr: float, scales: Mapping[str, Scale] | None
) -> list[torch.optim.Optimizer | None]:
    large = _scaled(groups.matrices | groups.head, lr, choice.weight_decay, scales)
    rest = _scaled(groups.embeddings, lr * choice.embedding_lr_ratio, _table_decay(choice), scales)
    rest += _scaled(groups.vectors, lr, 0.0, scales)
    if choice.state_bits == 32:
        return [_adamw(large + rest, choice.betas, choice.eps)]
    narrow = AdamW8bit(large, betas=choice.betas, eps=choice.eps) if large else None
    return [narrow, _adamw(rest, choice.betas, choice.eps)]


def _scaled(named: Named, lr: float, decay: float, scales: Mapping[str, Scale] | None) -> list[dict[str, Any]]:
    """Groups of one rate each. scales: factors of `train.mup`."""
    if scales is None:
        return _group(named.values(), lr, decay)
    return [
        group
        for scale, members in split_by_scale(named, scales).items()
        for group in _group(members, lr * scale.lr, decay * scale.decay)
    ]


def _build_muon(
    whole: ParameterGroups,
    groups: ParameterGroups,
    choice: choices.Muon,
    lr: float,
    dtype: torch.dtype | None,
    exchange: Exchange | None,
) -> list[torch.optim.Optimizer | None]:
    matrices = dict(groups.matrices)
    if exchange is not None:  # whoever has no piece of a matrix still takes part in bringing it together
        matrices = {
            name: groups.matrices.get(name, nn.Parameter(parameter.detach().new_empty(0)))
            for name, parameter in whole.matrices.items()
        }
    members = _group(matrices.values(), lr, choice.weight_decay, names=list(matrices))
    muon = Muon(
        members, lr=lr, momentum=choice.momentum, nesterov=choice.nesterov, iterations=choice.iterations, dtype=dtype,
        state_bits=choice.state_bits, exchange=exchange,
    ) if members else None  # fmt: skip
    other = lr * choice.adam_lr_ratio
    rest = _group([*groups.head.values(), *groups.vectors.values()], other, 0.0)
    rest += _group(groups.embeddings.values(), other * choice.embedding_lr_ratio, 0.0)
    return [muon, _adamw(rest, choice.betas, choice.eps)]


def _build_sgd(groups: ParameterGroups, choice: choices.SGD, lr: float) -> torch.optim.SGD | None:
    members = _group([*groups.matrices.values(), *groups.head.values()], lr, choice.weight_decay)
    members += _rest(groups, choice, lr)
    if not members:
        return None
    return torch.optim.SGD(members, momentum=choice.momentum, nesterov=choice.nesterov, fused=_can_fuse(members))


def _build_adafactor(groups: ParameterGroups, choice: choices.Adafactor, lr: float) -> Adafactor | None:
    members = _group([*groups.matrices.values(), *groups.head.values()], lr, choice.weight_decay, factored=True)
    tables = _group(groups.embeddings.values(), lr * choice.embedding_lr_ratio, _table_decay(choice), factored=True)
    members += tables + _group(groups.vectors.values(), lr, 0.0, factored=False)
    return Adafactor(
        members, decay_power=choice.decay_power, clip=choice.clip, eps=choice.eps, momentum=choice.momentum,
        scale_by_weights=choice.scale_by_weights,
    ) if members else None  # fmt: skip


def _rest(groups: ParameterGroups, choice: choices.AdamW | choices.SGD, lr: float) -> list[dict[str, Any]]:
    """Vectors and embeddings."""
    tables = _group(groups.embeddings.values(), lr * choice.embedding_lr_ratio, _table_decay(choice))
    return tables + _group(groups.vectors.values(), lr, 0.0)


def _table_decay(choice: choices.AdamW | choices.SGD | choices.Adafactor) -> float:
    return choice.weight_decay if choice.decay_embeddings else 0.0


def _adamw(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.AdamW | None:
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=_can_fuse(groups)) if groups else None


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    return {p.device.type for group in groups for p in group["params"]} <= {"cpu", "cuda"}


def _refuse_pieces(kind: str, model: nn.Module, pieces: Named, whole: Named) -> None:
    """`HanlinError` with the name of a parameter that this rank has a part of only."""
    part = getattr(model, "part", None)
    for name, piece in pieces.items():
        cut = part is not None and isinstance(part.layouts.get(name, (None, 0))[0], Cut)
        if not cut and piece is whole[name]:
            continue
        how = "cut over the ranks of parallel.tensor" if cut else "shared among ranks (parallel.shard)"
        raise HanlinError(
            f"train.optimizer {kind} needs whole matrices, but {name} is {how}. Take adamw or sgd, or another layout."
        )
