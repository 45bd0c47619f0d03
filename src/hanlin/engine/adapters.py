"""Many LoRA adapters over one model, in one batch (S-LoRA, arXiv:2311.03285; Punica, arXiv:2310.18547).

    tokens      [ a a a a | b | a | – – – ]        each sequence has its adapter, or none
    W x         one product over all of them
    + s B A x   one small product for each run of tokens with the same adapter

An adapter is loaded from PEFT's files and let go while the engine runs. Requests hold their adapter themselves: one
that is unloaded takes no new requests, those under way end with it, and then its memory is free. What was computed with
an adapter is found in the cache by its numbers, not by its name: other files under an old name find nothing, the same
files find their pages again, on disk even after a restart.
"""

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.models.transformer import Transformer
from hanlin.nn.linear import Linear, PackedLinear
from hanlin.tune.lora import find_linears
from hanlin.tune.peft_files import read_lora


class Adapter:
    """A and s B of each layer it changes, by the layer's name. key: unlike that of every other adapter; contents: the
    hash of all factors, the same wherever they are loaded."""

    def __init__(self, name: str, key: str, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.name, self.key, self.factors, self.contents = name, key, factors, hash_of(factors)


class Adapters:
    """The adapters of one model. `select` says whose tokens the next forward pass computes."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._linears = find_linears(model)
        self._packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        self._loaded: dict[str, Adapter] = {}
        self._alive: WeakValueDictionary[str, Adapter] = WeakValueDictionary()
        self._numbers = itertools.count(1)
        self._branches = {name: _Runs(layer.out_features) for name, layer in self._linears.items()}
        self._on = False

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    def load(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Read an adapter in PEFT's files. HanlinError: the name is taken, or the folder holds no LoRA of this
        model."""
        if name in self._loaded:
            raise HanlinError(f"There is an adapter `{name}` already; unload it first, or choose another name.")
        dtype, device = self._model.dtype, self._model.device
        factors = {
            layer: (a.to(device, dtype), (b.double() * settings.scale).to(device, dtype))
            for layer, (settings, a, b) in read_lora(self._model, folder).layers.items()
        }
        adapter = Adapter(name, f"{name}#{next(self._numbers)}", factors)
        self._loaded[name] = self._alive[adapter.key] = adapter

    def unload(self, name: str) -> None:
        """Take no more requests for it; those under way end with it."""
        self.find(name)
        del self._loaded[name]

    def find(self, name: str) -> Adapter:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none is loaded"
            raise HanlinError(f"There is no adapter `{name}`; there is: {known}.")
        return self._loaded[name]

    def select(self, keys: Sequence[str | None], counts: Sequence[int]) -> None:
        """The next flat batch: sequence i, of counts[i] tokens, is of the adapter with keys[i]."""
        runs: list[tuple[slice, Adapter]] = []
        at = 0
        for key, group in itertools.groupby(zip(keys, counts, strict=True), key=lambda pair: pair[0]):
            size = sum(count for _, count in group)
            if key is not None:
                runs.append((slice(at, at + size), self._alive[key]))
            at += size
        if not runs and not self._on:
            return
        for name, branch in self._branches.items():
            branch.runs = [(where, adapter.factors[name]) for where, adapter in runs if name in adapter.factors]
            layer: Linear = self._linears[name]
            layer.branch = branch if branch.runs else None
        for module in self._packed:
            module.note_branches()
        self._on = bool(runs)


def hash_of(factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(factors):
        for factor in factors[name]:
            found.update(f"{name} {tuple(factor.shape)} {factor.dtype}".encode())
            found.update(factor.contiguous().cpu().view(torch.uint8).numpy())
    return found.hexdigest()


class _Runs:
    """`Linear.branch` of one layer: what the adapters add to their tokens, zero elsewhere."""

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs
        self.runs: list[tuple[slice, tuple[Tensor, Tensor]]] = []

    def __call__(self, x: Tensor) -> Tensor:  # (1, N, in) -> (1, N, out)
        out = x.new_zeros(*x.shape[:-1], self._outputs)
        for where, (a, b) in self.runs:
            out[:, where] = F.linear(F.linear(x[:, where], a), b)
        return out
