"""Which parameter gets which optimiser, and the step over all of them.

    matrices     weights of two dimensions that are neither embedding nor output head
    head         the output head, where it is not the embedding itself
    embeddings   lookup tables
    vectors      norms and biases

AdamW decays matrices and head (embeddings if asked), Muon takes the matrices and leaves the rest to AdamW.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.train import settings
from hanlin.train.muon import Muon

Named = dict[str, nn.Parameter]


@dataclass(frozen=True)
class ParameterGroups:
    """Trainable parameters by kind, each by name; a shared one (tied embeddings) stands once."""

    matrices: Named
    head: Named
    embeddings: Named
    vectors: Named


def group_parameters(model: nn.Module) -> ParameterGroups:
    """Sort the trainable parameters of `model` into the four kinds."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = id(getattr(model, "head_weight", None))
    groups = ParameterGroups({}, {}, {}, {})
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            groups.embeddings[name] = parameter
        elif id(parameter) == head:
            groups.head[name] = parameter
        elif parameter.ndim == 2:
            groups.matrices[name] = parameter
        else:
            groups.vectors[name] = parameter
    return groups


class Optimizer:
    """One or more `torch.optim` optimisers stepped as one, with a state of named tensors.

    parts: their groups carry `peak`, the rate at factor 1. names: every parameter by name.
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
                    found.update({f"{name}/{key}": value for key, value in part.state.get(parameter, {}).items()})
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
    model: nn.Module, choice: settings.AdamW | settings.Muon, lr: float, *, dtype: torch.dtype | None = None
) -> Optimizer:
    """The optimiser of a recipe over the trainable parameters of `model` (already on its device).

    dtype: of Muon's products (None: the parameters'). AdamW is torch's fused one on CPU and CUDA.
    """
    groups = group_parameters(model)
    names = groups.matrices | groups.head | groups.embeddings | groups.vectors
    if not names:
        raise HanlinError("The model has no trainable parameter: every one has requires_grad=False.")
    if isinstance(choice, settings.Muon):
        matrices = _group(groups.matrices.values(), lr, choice.weight_decay)
        rest = [*groups.head.values(), *groups.embeddings.values(), *groups.vectors.values()]
        muon = Muon(
            matrices, lr=lr, momentum=choice.momentum, nesterov=choice.nesterov, iterations=choice.iterations,
            dtype=dtype,
        ) if matrices else None  # fmt: skip
        adam = _adamw(_group(rest, lr * choice.adam_lr_ratio, 0.0), choice.betas, choice.eps)
        return Optimizer([part for part in (muon, adam) if part is not None], names)
    decayed = [*groups.matrices.values(), *groups.head.values()]
    plain = [*groups.vectors.values()]
    (decayed if choice.decay_embeddings else plain).extend(groups.embeddings.values())
    adam = _adamw(_group(decayed, lr, choice.weight_decay) + _group(plain, lr, 0.0), choice.betas, choice.eps)
    return Optimizer([adam] if adam is not None else [], names)


def clip_gradients(parameters: Iterable[Tensor], norm: float, limit: float | None) -> None:
    """Scale all gradients so that their global norm `norm` (see `gradient_norm`) becomes at most `limit`."""
    if limit is not None and norm > limit:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], limit / (norm + 1e-6))


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients together, a scalar on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _group(parameters: Iterable[nn.Parameter], peak: float, decay: float) -> list[dict]:
    members = list(parameters)
    return [{"params": members, "peak": peak, "lr": peak, "weight_decay": decay}] if members else []


def _adamw(groups: list[dict], betas: tuple[float, float], eps: float) -> torch.optim.AdamW | None:
    if not groups:
        return None
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = devices <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=fused)
