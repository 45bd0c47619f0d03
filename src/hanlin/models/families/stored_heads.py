"""Heads that the files of a family hold beside the language model: BERT's pooler and its judge of sentence pairs.

Where a file holds all weights of such a head, the loaded model has it as a child of that name, and saving gives it
back. Other heads (`nn.heads`) are saved in a file of their own, see `models.heads_file`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import cast

from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.models.families.weights import Rule, renamed


@dataclass(frozen=True)
class StoredHead:
    """name: of the child of a `Transformer`; kind: its class, made from the width; weights: (their name, our name
    within the child). architecture: what files call a language model that has this head too (None: as one without)."""

    name: str
    kind: type[nn.Module]
    weights: tuple[tuple[str, str], ...]
    architecture: str | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(renamed(theirs, f"{self.name}.{ours}") for theirs, ours in self.weights)

    def make(self, width: int) -> nn.Module:
        return cast(Callable[[int], nn.Module], self.kind)(width)

    @property
    def stored(self) -> set[str]:
        """Their names."""
        return {theirs for theirs, _ in self.weights}


def heads_in(heads: tuple[StoredHead, ...], names: Collection[str], prefix: str = "") -> list[StoredHead]:
    """The heads of which a file holds every weight; a weight is part of the first one only. prefix: what its names
    lack."""
    left, found = {*names, *(prefix + name for name in names)}, []
    for head in heads:
        if head.stored <= left:
            left -= head.stored
            found.append(head)
    return found


def heads_of(heads: tuple[StoredHead, ...], model: nn.Module) -> list[StoredHead]:
    """The heads that a model has as children; two that would be stored under one name are a `HanlinError`."""
    found = [head for head in heads if type(getattr(model, head.name, None)) is head.kind]
    for index, head in enumerate(found):
        for other in found[:index]:
            if both := sorted(head.stored & other.stored):
                raise HanlinError(
                    f"The model has the heads {other.name} and {head.name}, which would both be saved as {both[0]}. "
                    f"Take one off: `del model.{head.name}`."
                )
    return found
