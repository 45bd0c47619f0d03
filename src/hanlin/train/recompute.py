"""Activations that the backward pass makes again (arXiv:1604.06174): memory for time.

    full        keep x; backward runs the layer again         about a third more work, one tensor a layer stays
    layers      so in every n-th layer
    operators   keep the results of products and attention,   cheap work twice: norms, rotation, activations, dropout
                make again what lies between                  (arXiv:2205.05198)

A layer that runs twice must do the same twice. Random numbers are drawn from the same states, torch's and those of
generators that a module owns; the masks and tables that layers share are made as they were; and what the routers chose
is noted the first time only. Gradients are equal bit for bit, except that under `operators` the compiler's fusion or
another kernel may round otherwise.

What is kept by `operators` are results of torch's own products and attention. Hanlin's attention for CPUs
(`nn.block_attention`) is no such operation and runs again.
"""

from collections.abc import Generator as Yields
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hanlin.core.errors import HanlinError
from hanlin.models.layer import Layer
from hanlin.models.shared import Shared
from hanlin.models.transformer import Transformer
from hanlin.train.choices import Recompute

aten: Any = torch.ops.aten
NAMES = (  # not bmm: in attention by hand its results are the scores, O(T^2)
    "mm", "addmm", "_scaled_mm", "_grouped_mm", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip


def kept_operators() -> list[Any]:
    """Whose results `operators` keeps; those that this torch has."""
    return [getattr(aten, name).default for name in NAMES if hasattr(aten, name)]


def recompute_layers(model: Transformer, choice: Recompute) -> list[Layer]:
    """Let layers of `model` run as `choice` says, in place, while gradients are recorded -> those that recompute.

    To be called after whatever else changes the layers (tensor parallelism, pipeline); `remember_layers` undoes it.
    """
    remember_layers(model)
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if choice.kind == "none":
        return []
    if getattr(model.model, "query_embed", None) is not None:
        raise HanlinError(
            "train.recompute does not support relative attention with two streams (XLNet), which does not run its "
            "layers as a whole. Leave it out."
        )
    if choice.kind == "layers":
        every = choice.every or 2
        layers = layers[every - 1 :: every]
        if not layers:
            raise HanlinError(f"train.recompute.every is {every}, but the model has fewer layers here. Choose less.")
    for layer in layers:
        layer.forward = Recomputed(layer, operators=choice.kind == "operators")
    return layers


def remember_layers(model: nn.Module) -> None:
    """Undo `recompute_layers`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Recomputed):
            del module.forward


class Recomputed:
    """The forward of one layer, which runs again in the backward pass. (A value of the layer: a copied model's copy
    belongs to the copied layer.)"""

    def __init__(self, layer: Layer, *, operators: bool) -> None:
        self.layer, self.operators = layer, operators

    def __call__(self, x: Tensor, shared: Shared) -> Tensor:
        layer = self.layer
        if not torch.is_grad_enabled():
            return type(layer).forward(layer, x, shared)
        made = dict(shared._made)  # what a second pass finds, it must find as the first did
        found = [getattr(module, "generator", None) for module in layer.modules()]
        states = {g: g.get_state() for g in found if isinstance(g, Generator)}
        first = True

        def run(x: Tensor) -> Tensor:
            nonlocal first
            if first:
                first = False
                return type(layer).forward(layer, x, shared)
            again = replace(shared, routing=[], _made=dict(made))
            with _drawing_from(states):
                return type(layer).forward(layer, x, again)

        if not self.operators:
            return checkpoint(run, x, use_reentrant=False)
        return checkpoint(run, x, use_reentrant=False, context_fn=_contexts)


@contextmanager
def _drawing_from(states: dict[Generator, Tensor]) -> Yields[None]:
    """Generators begin at `states` inside, and afterwards are where they were."""
    now = {g: g.get_state() for g in states}
    for generator, state in states.items():
        generator.set_state(state)
    try:
        yield
    finally:
        for generator, state in now.items():
            generator.set_state(state)


def _contexts() -> tuple[Any, Any]:
    """For the first run and for the second."""
    kept = kept_operators()
    if torch.compiler.is_compiling():
        return create_selective_checkpoint_contexts(kept)
    results: dict[Any, list[Any]] = {operator: [] for operator in kept}
    return _Keep(results), _Replay(results)


class _Keep(TorchDispatchMode):
    """Writes the results of operators down. torch's own form of this refuses a result that is changed in place later,
    as that of a projection with an adapter is; here it is forgotten, and made again."""

    def __init__(self, results: dict[Any, list[Any]]) -> None:
        super().__init__()
        self._results = results
        self._place: dict[int, tuple[Any, int]] = {}  # storage -> (operator, number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _written(func, args, kwargs or {}):
            found = self._place.pop(_storage(tensor), None)
            if found is not None:
                self._results[found[0]][found[1]] = None
        results = self._results.get(func)
        if results is not None:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._place[_storage(tensor)] = func, len(results)
            results.append(tree_map_only(Tensor, torch.detach, out))
        return out


class _Replay(TorchDispatchMode):
    """Gives the written results back, in order."""

    def __init__(self, results: dict[Any, list[Any]]) -> None:
        super().__init__()
        self._results, self._next = results, dict.fromkeys(results, 0)

    def __enter__(self) -> "_Replay":
        self._next = dict.fromkeys(self._results, 0)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = self._results.get(func)
        if results is not None:
            number = self._next[func]
            self._next[func] += 1
            if results[number] is not None:
                return tree_map_only(Tensor, torch.detach, results[number])
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator changes in place. A collective may change any of its own."""
    if getattr(func, "namespace", "") == "c10d":
        return [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = [*zip(schema.arguments, args, strict=False), *((a, kwargs.get(a.name)) for a in schema.arguments)]
    written = [value for argument, value in named if argument.alias_info is not None and argument.alias_info.is_write]
    return [t for t in tree_leaves(written) if isinstance(t, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
