"""How the weights of a family's files stand to ours: renamed, transposed, cut into parts, stacked.

A `Rule` is one row of a family's weight table. `{}` in a name stands for a number (a layer); `{e}` counts the experts,
of which all together are one tensor here. A weight that no row matches has the same name on both sides.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ModelConfig

Shapes = Sequence[tuple[int, ...]]
ToOurs = Callable[[list[Tensor], Shapes, ModelConfig], list[Tensor]]  # their tensors, our shapes
ToTheirs = Callable[[list[Tensor], ModelConfig], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """theirs, ours: templates of names that belong together; to_ours and to_theirs: one side's tensors from the
    other's."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: ToOurs
    to_theirs: ToTheirs


@dataclass(frozen=True)
class Bound:
    """A rule with the numbers filled in: full names on both sides."""

    rule: Rule
    theirs: tuple[str, ...]
    ours: tuple[str, ...]

    def shapes(self, ours: dict[str, tuple[int, ...]], config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The shapes of their tensors that fit our shapes."""
        empty = [torch.empty(ours[name], device="meta") for name in self.ours]
        made = self.rule.to_theirs(empty, config)
        return {name: tuple(tensor.shape) for name, tensor in zip(self.theirs, made, strict=True)}


def renamed(theirs: str, ours: str) -> Rule:
    """The same tensor under another name."""
    return Rule((theirs,), (ours,), lambda t, shapes, c: t, lambda t, c: t)


def transposed(theirs: str, ours: str) -> Rule:
    """Theirs is (in, out), as GPT-2's `Conv1D` keeps it, or (experts, in, out)."""
    return Rule((theirs,), (ours,), lambda t, shapes, c: [t[0].mT], lambda t, c: [t[0].mT])


def alternating(theirs: str, ours: str, *, transpose: bool = False) -> Rule:
    """The rows of gate and up alternate in theirs (experts, rows, ...), ours has all rows of the gate first (gpt-oss);
    transpose: theirs is then (experts, in, out)."""

    def to_ours(tensors: list[Tensor], shapes: Shapes, config: ModelConfig) -> list[Tensor]:
        whole = tensors[0].mT if transpose else tensors[0]
        return [torch.cat([whole[:, ::2], whole[:, 1::2]], 1)]

    def to_theirs(tensors: list[Tensor], config: ModelConfig) -> list[Tensor]:
        whole = torch.stack(tensors[0].chunk(2, dim=1), 2).flatten(1, 2)
        return [whole.mT if transpose else whole]

    return Rule((theirs,), (ours,), to_ours, to_theirs)


def fused(theirs: str, ours: Iterable[str], *, transpose: bool = False, dim: int = 0) -> Rule:
    """Ours stand one after the other in theirs, along `dim`; transpose: theirs is then (in, out)."""

    def to_ours(tensors: list[Tensor], shapes: Shapes, config: ModelConfig) -> list[Tensor]:
        whole = tensors[0].T if transpose else tensors[0]
        return list(whole.split([shape[dim] for shape in shapes], dim=dim))

    def to_theirs(tensors: list[Tensor], config: ModelConfig) -> list[Tensor]:
        whole = torch.cat(tensors, dim=dim)
        return [whole.T if transpose else whole]

    return Rule((theirs,), tuple(ours), to_ours, to_theirs)


def interleaved(theirs: str, ours: tuple[str, str, str]) -> Rule:
    """For each key head in turn its query heads, its key and its value (BLOOM, GPT-NeoX, Falcon): rows of a weight
    (out, in), or of a bias."""

    def sizes(config: ModelConfig) -> tuple[int, int, int]:
        a = config.layers[0].attention
        assert isinstance(a, AttentionConfig)
        return a.kv_heads, a.heads // a.kv_heads, a.head_dim

    def to_ours(tensors: list[Tensor], shapes: Shapes, config: ModelConfig) -> list[Tensor]:
        kv_heads, groups, width = sizes(config)
        whole = tensors[0].reshape(kv_heads, groups + 2, width, *tensors[0].shape[1:])
        parts = whole.split([groups, 1, 1], dim=1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def to_theirs(tensors: list[Tensor], config: ModelConfig) -> list[Tensor]:
        kv_heads, groups, width = sizes(config)
        rest = tensors[0].shape[1:]
        parts = [t.reshape(kv_heads, n, width, *rest) for t, n in zip(tensors, (groups, 1, 1), strict=True)]
        return [torch.cat(parts, dim=1).reshape(-1, *rest)]

    return Rule((theirs,), ours, to_ours, to_theirs)


def stacked(theirs: tuple[str, ...], ours: str) -> Rule:
    """Each expert's tensors `theirs` (with `{e}`), one below the other, all experts in ours: (experts, rows, ...)."""

    def to_ours(tensors: list[Tensor], shapes: Shapes, config: ModelConfig) -> list[Tensor]:
        step = len(theirs)
        each = [torch.cat(tensors[i : i + step]) for i in range(0, len(tensors), step)]
        return [torch.stack(each)]

    def to_theirs(tensors: list[Tensor], config: ModelConfig) -> list[Tensor]:
        return [part for expert in tensors[0].unbind() for part in expert.chunk(len(theirs))]

    return Rule(theirs, (ours,), to_ours, to_theirs)


def bind(rules: Sequence[Rule], ours: dict[str, tuple[int, ...]]) -> list[Bound]:
    """The rule of each of our weights (name -> shape); every name of ours is in exactly one of the results."""
    bound: dict[tuple[int, tuple[str, ...]], Bound] = {}
    for name, shape in ours.items():
        index, numbers = _find(rules, name)
        if index is None:
            bound[(-1, (name,))] = Bound(renamed(name, name), (name,), (name,))
            continue
        if (index, numbers) in bound:
            continue
        rule = rules[index]
        experts = shape[0] if any("{e}" in t for t in rule.theirs) else 1
        theirs = [t.replace("{e}", str(e)).format(*numbers) for e in range(experts) for t in rule.theirs]
        names = tuple(template.format(*numbers) for template in rule.ours)
        absent = [n for n in names if n not in ours]
        if absent:
            raise HanlinError(f"The weight table joins {name} with {absent[0]}, which this model does not have.")
        bound[(index, numbers)] = Bound(rule, tuple(theirs), names)
    return list(bound.values())


def match(template: str, name: str) -> tuple[str, ...] | None:
    """The numbers that `{}` stands for in a name, or None where it does not fit."""
    pattern = re.escape(template).replace(r"\{\}", r"(\d+)").replace(r"\{e\}", r"\d+")
    found = re.fullmatch(pattern, name)
    return None if found is None else found.groups()


def _find(rules: Sequence[Rule], ours: str) -> tuple[int | None, tuple[str, ...]]:
    for index, rule in enumerate(rules):
        for template in rule.ours:
            numbers = match(template, ours)
            if numbers is not None:
                return index, numbers
    return None, ()
