"""Low-rank adaptation (LoRA, arXiv:2106.09685).

    W x  ->  W x + s B A x        A (rank, in), B (out, rank); s = alpha / rank, or alpha / sqrt(rank) (rsLoRA,
                                  arXiv:2312.03732)

Only A and B learn (with DoRA, `tune.dora`, a magnitude for each row of W too). A starts at random and B at zero, so
that training starts from the model as it is; afterwards W + s B A can be put in the place of W. `add_lora` hangs a
branch (`tune.branch`) on the named `Linear`s of a model and freezes the rest; q, k and v stay one packed product. A and
B are parameters of the model, under the names that PEFT gives them in a file
(`model.layers.0.self_attn.q_proj.lora_A.weight`), so that an optimizer, a checkpoint or `model.to` sees them.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.nn.linear import Linear, PackedLinear
from hanlin.tune.branch import Branch, LoraSettings
from hanlin.tune.dora import DoraBranch

HEAD = "lm_head"
_ADAPTER = "adapter"  # the attribute of a model that holds its adapter


class LoraAdapter:
    """The handle of what `add_lora` added. branches: by the name of the layer."""

    def __init__(self, model: nn.Module, settings: LoraSettings, branches: dict[str, Branch]) -> None:
        self.model, self.settings, self.branches = model, settings, branches
        self.merged = False
        self._trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._trained:
            parameter.requires_grad_(False)
        for branch in branches.values():
            for name, child in branch.children().items():
                branch.layer.add_module(name, child)
        setattr(model, _ADAPTER, self)
        self.switch(on=True)

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer (and the magnitudes of DoRA): all that learns."""
        children = [child for branch in self.branches.values() for child in branch.children().values()]
        return [weight for child in children for weight in child.parameters()]

    def merge(self) -> None:
        """W + s B A in the place of W: the speed of the plain model. Exact to the rounding of W's dtype."""
        if self.merged:
            raise HanlinError("The adapter is merged already.")
        if not self.on:
            raise HanlinError("The adapter is switched off; merge it outside `without_adapter`.")
        self._rewrite(lambda branch: branch.merged())

    def unmerge(self) -> None:
        """W in its own place again, to rounding, and the branches on."""
        if not self.merged:
            raise HanlinError("The adapter is not merged.")
        self._rewrite(lambda branch: branch.unmerged())

    def remove(self) -> None:
        """Leave the model as it was: no A and B, what could be trained can be again. What is merged stays merged."""
        self.switch(on=False)
        for branch in self.branches.values():
            for name in branch.children():
                delattr(branch.layer, name)
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
    def _rewrite(self, new_weight: Callable[[Branch], Tensor]) -> None:
        for name, branch in self.branches.items():
            if branch.layer.weight.is_meta:
                raise HanlinError(
                    f"{name} is frozen into a faster layout and its plain weight given back; merge before that."
                )
        for branch in self.branches.values():
            branch.layer.weight.copy_(new_weight(branch))
        self.merged = not self.merged
        self.switch(on=not self.merged)


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Iterable[str] | str = ("q_proj", "k_proj", "v_proj", "o_proj"),
    *,
    rslora: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> LoraAdapter:
    """Hang a low-rank branch on every `Linear` that `targets` name, and freeze all other parameters.

    targets: last parts of module names (`q_proj`, `mlp.up_proj`, `layers.3.self_attn.q_proj`), or "all" for every
    `Linear` but the output head. dora: learn how long each row of the weight is too (`tune.dora`). seed: of A. dtype:
    of A and B; None: that of the layer, but at least fp32.
    An unknown target, a second adapter, a rank below 1 is a `HanlinError`; the model is then as it was.
    """
    names = find_targets(model, targets)
    settings = LoraSettings(rank, alpha, rslora, dropout, dora)
    adapter = attach_lora(model, settings, dict.fromkeys(names, settings), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for branch in adapter.branches.values():
        branch.draw(generator)
    return adapter


def attach_lora(
    model: nn.Module, settings: LoraSettings, layers: Mapping[str, LoraSettings], *, dtype: torch.dtype | None = None
) -> LoraAdapter:
    """`add_lora` with settings for every layer by name; A and B still hold no values."""
    if adapter_of(model) is not None:
        raise HanlinError("The model has an adapter already; `remove()` it, or `merge()` and `remove()`, first.")
    linears = find_linears(model)
    branches: dict[str, Branch] = {}
    for name, own in layers.items():
        weight = linears[name].weight
        kind = DoraBranch if own.dora else Branch
        branches[name] = kind(linears[name], own, dtype or torch.promote_types(weight.dtype, torch.float32))
    return LoraAdapter(model, settings, branches)


def adapter_of(model: nn.Module) -> LoraAdapter | None:
    """The adapter that hangs on the model."""
    return getattr(model, _ADAPTER, None)


@contextmanager
def without_adapter(model: nn.Module) -> Generator[None]:
    """Within it the model is its base: the reference policy of preference learning, at no memory.

    A model without an adapter stays itself, and so does one within another `without_adapter`. A merged adapter is a
    `HanlinError`: its base is not there (`unmerge` first).
    """
    adapter = adapter_of(model)
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
