"""Many LoRA adapters over one model, in one batch (S-LoRA, arXiv:2311.03285; Punica, arXiv:2310.18547).

    tokens      [ a a a a | b | a | – – – ]        each sequence has its adapter, or none
    W x         one product over all of them
    + s B A x   one small product for each run of tokens with the same adapter, which DoRA (`tune.dora`) stretches

An adapter is loaded from PEFT's files and let go while the engine runs. Requests hold their adapter themselves: one
that is unloaded takes no new requests, those under way end with it, and then its memory is free. What was computed with
an adapter is found in the cache by its numbers, not by its name: other files under an old name find nothing, the same
files find their pages again, on disk even after a restart.
"""

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.models.transformer import Transformer
from hanlin.nn.frozen import Product
from hanlin.nn.linear import Linear, PackedLinear
from hanlin.tune.branch import LoraSettings
from hanlin.tune.dora import absorb, row_lengths, stretch
from hanlin.tune.lora import find_linears
from hanlin.tune.peft_files import read_lora

BESIDE = 2.0**60  # times this, a product is so large that the bias added to it does not change a digit


class Factors(NamedTuple):
    """What an adapter does to one layer: a (rank, in); b (out, rank) with its scale. DoRA: gain (out,), and bias
    (out,), what the layer's own is owed."""

    a: Tensor
    b: Tensor
    gain: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:  # (..., in), W x + b (..., out) -> (..., out)
        added = F.linear(F.linear(x, self.a), self.b, self.bias)
        return added if self.gain is None else stretch(out, self.gain, added)


class Adapter:
    """The factors of each layer it changes, by the layer's name. key: unlike that of every other adapter; contents: the
    hash of all factors, the same wherever they are loaded."""

    def __init__(self, name: str, key: str, factors: dict[str, Factors]) -> None:
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
        self._branches = {name: _Runs() for name in self._linears}
        self._on = False

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    def load(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Read an adapter in PEFT's files. HanlinError: the name is taken, or the folder holds no LoRA of this
        model."""
        if name in self._loaded:
            raise HanlinError(f"There is an adapter `{name}` already; unload it first, or choose another name.")
        layers = read_lora(self._model, folder).layers
        factors = {layer: self._factors(layer, settings, parts) for layer, (settings, parts) in layers.items()}
        adapter = Adapter(name, f"{name}#{next(self._numbers)}", factors)
        self._loaded[name] = self._alive[adapter.key] = adapter

    @torch.inference_mode()
    def _factors(self, name: str, settings: LoraSettings, parts: Mapping[str, Tensor]) -> Factors:
        dtype, device = self._model.dtype, self._model.device
        a, b = parts["lora_A"].to(device, dtype), (parts["lora_B"].double() * settings.scale).to(device, dtype)
        if not settings.dora:
            return Factors(a, b)
        base, product, bias = self._of_weight(name, a)
        wide = base.dtype
        lengths = row_lengths(base, product, a.to(wide), b.to(wide))
        gain = parts["lora_magnitude_vector"].to(device, wide) / lengths - 1
        b, bias = absorb(gain, b.to(wide), bias)
        return Factors(a, b.to(dtype), gain.to(dtype), None if bias is None else bias.to(dtype))

    def _of_weight(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of a layer's W and b, which may be frozen (`nn.frozen`): the lengths of the rows of W, (out,), and W x^T,
        both at least fp32; b."""
        layer = self._linears[name]
        if not layer.weight.is_meta:
            wide = torch.promote_types(layer.weight.dtype, torch.float32)
            lengths = torch.linalg.vector_norm(layer.weight, dim=1, dtype=wide)
            return lengths, F.linear(layer.weight.to(wide), x.to(wide)), layer.bias
        product, rows = layer.product, slice(None)
        parent, _, child = name.rpartition(".")
        owner = self._model.get_submodule(parent)
        if isinstance(owner, PackedLinear) and child in owner.packed:
            before = owner.projections()[: owner.packed.index(child)]
            start = sum(each.out_features for each in before)
            product, rows = owner.product, slice(start, start + layer.out_features)
        assert isinstance(product, Product)
        result = product(x * BESIDE).float().T[rows] / BESIDE
        return product.lengths[rows], result, None if product.bias is None else product.bias[rows]

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


def hash_of(factors: Mapping[str, Factors]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(factors):
        for factor in (factor for factor in factors[name] if factor is not None):
            found.update(f"{name} {tuple(factor.shape)} {factor.dtype}".encode())
            found.update(factor.contiguous().cpu().view(torch.uint8).numpy())
    return found.hexdigest()


class _Runs:
    """`Linear.branch` of one layer: what the adapters add to their tokens, zero elsewhere."""

    def __init__(self) -> None:
        self.runs: list[tuple[slice, Factors]] = []

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:  # (1, N, in), (1, N, out) -> (1, N, out)
        added = torch.zeros_like(out)
        for where, factors in self.runs:
            added[:, where] = factors(x[:, where], out[:, where])
        return added
