"""Heads (`nn.heads`) beside a model: `heads.safetensors`, whose header says of each what it is.

    {"judge": {"kind": "sequence_classifier", "width": 64, "labels": 3, "pooling": "cls", ...}}     tensors "judge.NAME"

Description and weights are one file, so that a reader never finds one without the other. `save_model` writes the heads
that are children of a `Transformer` (`model.judge = SequenceClassifier(...)`), `load_model` puts them back.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_path
from hanlin.nn.dropout import Dropout
from hanlin.nn.heads import NextSentence, Pooler, SequenceClassifier, TokenClassifier, ValueHead

FILE = "heads.safetensors"
HEADER = "heads"  # the field of the file's header that holds the descriptions


@dataclass(frozen=True)
class Kind:
    """make: the class; describe: the arguments that make such a head again."""

    make: type[nn.Module]
    describe: Callable[[Any], dict[str, Any]]


def save_heads(heads: Mapping[str, nn.Module], folder: str | os.PathLike[str]) -> None:
    """Write the heads into `folder`, atomically; without any, remove the file that an earlier save left.

    A module of another kind than those of `nn.heads` is a `HanlinError` before anything is written.
    """
    file = Path(folder) / FILE
    described = {name: _describe(name, head) for name, head in heads.items()}
    if not heads:
        file.unlink(missing_ok=True)
        return
    tensors = {
        f"{name}.{key}": tensor.detach().contiguous()
        for name, head in heads.items()
        for key, tensor in head.state_dict().items()
    }
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", HEADER: json.dumps(described)})


def load_heads(folder: str | os.PathLike[str]) -> dict[str, nn.Module]:
    """The heads in `folder`, in the dtype they were saved in and in evaluation mode; none where it has no such file."""
    file = Path(folder) / FILE
    if not file.exists():
        return {}
    try:
        with safe_open(file, framework="pt", device="cpu") as stream:
            described = json.loads((stream.metadata() or {}).get(HEADER, "null"))
            tensors = {name: stream.get_tensor(name) for name in list(stream.keys())}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise HanlinError(f"{file} is not a whole file of heads ({error}). Save the model again.") from error
    if not isinstance(described, dict):
        raise HanlinError(f"{file} does not say what its heads are: its header has no {HEADER!r}.")
    heads = {name: _make(name, table, file) for name, table in described.items()}
    for name, head in heads.items():
        own = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
        try:
            head.load_state_dict({key.removeprefix(f"{name}."): t.clone() for key, t in own.items()}, assign=True)
        except RuntimeError as error:
            raise HanlinError(f"{file}: the weights of the head {name!r} do not fit it. {error}") from error
    if tensors:
        raise HanlinError(f"{file} holds weights of no head that it names: {', '.join(sorted(tensors))}.")
    return {name: head.eval() for name, head in heads.items()}


def attached_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The children of a model that are heads of `nn.heads`, by name."""
    kinds = tuple(kind.make for kind in KINDS.values())
    return {name: child for name, child in model.named_children() if isinstance(child, kinds)}


def attach_heads(model: nn.Module, heads: Mapping[str, nn.Module]) -> None:
    """Make them children of the model. A name that the model uses already is a `HanlinError`."""
    for name, head in heads.items():
        if hasattr(model, name):
            raise HanlinError(f"A head cannot be called {name!r}: the model has something of that name.")
        model.add_module(name, head)


def _describe(name: str, head: nn.Module) -> dict[str, Any]:
    for kind, row in KINDS.items():
        if type(head) is row.make:
            return {"kind": kind, **row.describe(head)}
    known = ", ".join(row.make.__name__ for row in KINDS.values())
    raise HanlinError(f"The head {name!r} is a {type(head).__name__}; Hanlin saves {known}.")


def _make(name: str, table: Any, file: Path) -> nn.Module:
    if not isinstance(table, dict) or table.get("kind") not in KINDS:
        found = table.get("kind") if isinstance(table, dict) else table
        raise HanlinError(f"{file}: the head {name!r} is of the kind {found!r}; Hanlin knows {', '.join(KINDS)}.")
    arguments = {key: value for key, value in table.items() if key != "kind"}
    make = cast(Callable[..., nn.Module], KINDS[table["kind"]].make)
    try:
        with torch.device("meta"):  # nothing is drawn at random only to be overwritten
            return make(**arguments)
    except (TypeError, ValueError, HanlinError) as error:
        raise HanlinError(f"{file}: the head {name!r} cannot be made from {arguments}: {error}") from error


def _rate(dropout: Dropout | None) -> float:
    return 0.0 if dropout is None else dropout.p


KINDS: dict[str, Kind] = {
    "pooler": Kind(Pooler, lambda h: {"width": h.dense.in_features}),
    "next_sentence": Kind(NextSentence, lambda h: {"width": h.classifier.in_features}),
    "sequence_classifier": Kind(
        SequenceClassifier,
        lambda h: {
            "width": h.classifier.in_features,
            "labels": h.classifier.out_features,
            "pooling": h.pooling,
            "pooler": h.pooler is not None,
            "bias": h.classifier.bias is not None,
            "dropout": _rate(h.dropout),
        },
    ),
    "token_classifier": Kind(
        TokenClassifier,
        lambda h: {
            "width": h.classifier.in_features,
            "labels": h.classifier.out_features,
            "bias": h.classifier.bias is not None,
            "dropout": _rate(h.dropout),
        },
    ),
    "value": Kind(ValueHead, lambda h: {"width": h.value.in_features, "dropout": _rate(h.dropout)}),
}
