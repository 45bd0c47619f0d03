"""Low-rank adaptation (LoRA, arXiv:2106.09685).

    W x  ->  W x + s B A x        A (rank, in), B (out, rank); s = alpha / rank, or alpha / sqrt(rank) (rsLoRA,
                                  arXiv:2312.03732)

Only A and B learn. A starts at random and B at zero, so that training starts from the model as it is; afterwards
W + s B A can be put in the place of W. `add_lora` hangs a branch on the named `Linear`s of a model and freezes the
rest; q, k and v stay one packed product. A and B are parameters of the model, under the names that PEFT gives them in a
file (`model.layers.0.self_attn.q_proj.lora_A.weight`), so that an optimizer, a checkpoint or `model.to` sees them.
"""

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.nn.linear import Linear, PackedLinear

HEAD = "lm_head"
_ADAPTER = "adapter"  # the attribute of a model that holds its adapter


@dataclass(frozen=True)
class LoraSettings:
    """rank: of the update; alpha: its weight; rslora: divide by sqrt(rank), which keeps large ranks learning; dropout:
    of what goes into A, in training."""

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise HanlinError(f"The rank of a LoRA is {self.rank!r}; it must be a whole number of at least 1.")
        if not self.alpha > 0:
            raise HanlinError(f"`alpha` of a LoRA is {self.alpha!r}; it must be positive.")
        if not 0 <= self.dropout < 1:
            raise HanlinError(f"`dropout` of a LoRA is {self.dropout!r}; it must be at least 0 and below 1.")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Branch:
    """s B A of one layer, as `Linear.branch`; A and B are children of the layer."""

    def __init__(self, layer: Linear, settings: LoraSettings, dtype: torch.dtype) -> None:
        self.layer, self.settings = layer, settings
        self.a = _factor(layer.in_features, settings.rank, layer.weight.device, dtype)
        self.b = _factor(settings.rank, layer.out_features, layer.weight.device, dtype)
        for factor in (self.a, self.b):
            factor.train(layer.training)

    def __call__(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.settings.dropout and self.a.training:
            x = F.dropout(x, self.settings.dropout)
        low = F.linear(x, self.a.weight.to(x.dtype))  # (..., rank)
        return F.linear(low * self.settings.scale, self.b.weight.to(x.dtype))

    def update(self) -> Tensor:
        """s B A, (out, in), fp32 or fp64."""
        wide = torch.promote_types(self.a.weight.dtype, torch.float32)
        return (self.b.weight.to(wide) @ self.a.weight.to(wide)) * self.settings.scale

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """A uniform in +-1 / sqrt(in), as the reference does (on the CPU, so that no device changes it); B zero."""
        a = torch.empty(self.a.weight.shape).uniform_(-1, 1, generator=generator) / math.sqrt(self.a.in_features)
        self.a.weight.copy_(a)
        self.b.weight.zero_()


class LoraAdapter:
    """The handle of what `add_lora` added. branches: by the name of the layer."""

    def __init__(self, model: nn.Module, settings: LoraSettings, branches: dict[str, Branch]) -> None:
        self.model, self.settings, self.branches = model, settings, branches
        self.merged = False
        self._trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._trained:
            parameter.requires_grad_(False)
        for branch in branches.values():
            branch.layer.add_module("lora_A", branch.a)
            branch.layer.add_module("lora_B", branch.b)
        setattr(model, _ADAPTER, self)
        self.switch(on=True)

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer: all that learns."""
        pairs = [(branch.a.weight, branch.b.weight) for branch in self.branches.values()]
        return [cast(nn.Parameter, weight) for pair in pairs for weight in pair]

    def merge(self) -> None:
        """W + s B A in the place of W: the speed of the plain model. Exact to the rounding of W's dtype."""
        self._add(1, "is merged already")

    def unmerge(self) -> None:
        """W - s B A in the place of W, and the branches again: W comes back to rounding."""
        self._add(-1, "is not merged")

    def remove(self) -> None:
        """Leave the model as it was: no A and B, what could be trained can be again. What is merged stays merged."""
        self.switch(on=False)
        for branch in self.branches.values():
            del branch.layer.lora_A, branch.layer.lora_B
        for parameter in self._trained:
            parameter.requires_grad_(True)
        delattr(self.model, _ADAPTER)

    def switch(self, *, on: bool) -> None:
        """Hang the branches on their layers, or take them off. (`without_adapter` does both.)"""
        for branch in self.branches.values():
            branch.layer.branch = branch if on else None
        for module in self.model.modules():
            if isinstance(module, PackedLinear):
                module.note_branches()

    @property
    def on(self) -> bool:
        """Whether the branches act."""
        return any(branch.layer.branch is branch for branch in self.branches.values())

    @torch.no_grad()
    def _add(self, sign: int, refusal: str) -> None:
        if self.merged is (sign > 0):
            raise HanlinError(f"The adapter {refusal}.")
        if not self.merged and not self.on:
            raise HanlinError("The adapter is switched off; merge it outside `without_adapter`.")
        for name, branch in self.branches.items():
            if branch.layer.weight.is_meta:
                raise HanlinError(
                    f"{name} is frozen into a faster layout and its plain weight given back; merge before that."
                )
        for branch in self.branches.values():
            weight, update = branch.layer.weight, branch.update()
            wide = torch.promote_types(weight.dtype, update.dtype)
            weight.copy_(weight.to(wide) + sign * update.to(wide))
        self.merged = sign > 0
        self.switch(on=not self.merged)


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Iterable[str] | str = ("q_proj", "k_proj", "v_proj", "o_proj"),
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> LoraAdapter:
    """Hang a low-rank branch on every `Linear` that `targets` name, and freeze all other parameters.

    targets: last parts of module names (`q_proj`, `mlp.up_proj`, `layers.3.self_attn.q_proj`), or "all" for every
    `Linear` but the output head. seed: of A. dtype: of A and B; None: that of the layer, but at least fp32.
    An unknown target, a second adapter, a rank below 1 is a `HanlinError`; the model is then as it was.
    """
    names = find_targets(model, targets)
    settings = LoraSettings(rank, alpha, rslora, dropout)
    adapter = attach_lora(model, settings, dict.fromkeys(names, settings), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for branch in adapter.branches.values():
        branch.draw(generator)
    return adapter


def attach_lora(
    model: nn.Module, settings: LoraSettings, layers: Mapping[str, LoraSettings], *, dtype: torch.dtype | None = None
) -> LoraAdapter:
    """`add_lora` with settings for every layer by name; A and B still hold no values."""
    if hasattr(model, _ADAPTER):
        raise HanlinError("The model has an adapter already; `remove()` it, or `merge()` and `remove()`, first.")
    linears = find_linears(model)
    branches: dict[str, Branch] = {}
    for name, own in layers.items():
        weight = linears[name].weight
        branches[name] = Branch(linears[name], own, dtype or torch.promote_types(weight.dtype, torch.float32))
    return LoraAdapter(model, settings, branches)


@contextmanager
def without_adapter(model: nn.Module) -> Generator[None]:
    """Within it the model is its base: the reference policy of preference learning, at no memory.

    A model without an adapter stays itself, and so does one within another `without_adapter`. A merged adapter is a
    `HanlinError`: its base is not there (`unmerge` first).
    """
    adapter = getattr(model, _ADAPTER, None)
    if adapter is None or not (adapter.on or adapter.merged):
        yield
        return
    if adapter.merged:
        raise HanlinError("The adapter is merged into the weights and cannot be switched off; `unmerge()` it first.")
    adapter.switch(on=False)
    try:
        yield
    finally:
        adapter.switch(on=True)


def find_linears(model: nn.Module) -> dict[str, Linear]:
    """Every `Linear` that can have a branch, by name. Not the output head: losses read its weight and never call it."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear) and n.split(".")[-1] != HEAD}


def find_targets(model: nn.Module, targets: Iterable[str] | str) -> list[str]:
    """The names of the `Linear`s that `targets` mean, in the order of the model."""
    linears = list(find_linears(model))
    if targets == "all":
        return linears
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise HanlinError('`targets` is empty; name the layers that LoRA adapts, or "all".')
    for target in wanted:
        if any(_is_meant(name, target) for name in linears):
            continue
        if target.split(".")[-1] == HEAD:
            raise HanlinError(
                "The output head cannot have a LoRA: losses go through its weight a chunk at a time and never call it."
            )
        depth = target.count(".") + 1
        known = sorted({".".join(name.split(".")[-depth:]) for name in linears})
        near = get_close_matches(target, known, n=1, cutoff=0.3)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        leaves = ", ".join(sorted({name.split(".")[-1] for name in linears}))
        raise HanlinError(f'LoRA finds no linear layer "{target}" in this model; it has {leaves}.{hint}')
    return [name for name in linears if any(_is_meant(name, target) for target in wanted)]


def _is_meant(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _factor(width: int, out: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """Torch's own `Linear`, without values: `nn.frozen` shall leave it alone."""
    factor = nn.Linear(width, out, bias=False, device="meta", dtype=dtype)
    factor.weight = nn.Parameter(torch.empty(out, width, device=device, dtype=dtype))
    return factor
