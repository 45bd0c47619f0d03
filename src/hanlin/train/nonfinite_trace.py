"""Where in a model numbers stopped being finite: the first module whose output went bad, or whose gradient did.

    forward    modules end in order, children before parents: the first bad output is the deepest and earliest
    backward   gradients arrive from the loss: of the parameters with a bad one, those of the module that ran last

Projections that share one product (`nn.linear.PackedLinear`) are no calls of their own; their slices of the product are
looked at one by one. The model runs again, uncompiled, on the batch that failed; nothing of it is changed.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hanlin.nn.linear import PackedLinear

OUTPUT, GRADIENT, LOSS = "output", "gradient", "loss"


@dataclass(frozen=True)
class Trace:
    """module: dotted name; what: of it was not finite, its output, its gradient, or the loss behind the last module.

    bad, size: how many numbers of that tensor were not finite. before: a child of `module` whose input was not finite
    either, although the outputs of all modules before it were: it happened in `module` itself, between the two.
    weights: parameters of the module that are not finite themselves.
    """

    module: str
    what: str
    bad: int
    size: int
    before: str = ""
    weights: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.what == LOSS:
            return "Every module's output is finite; the loss itself is not (the output head and what follows it)."
        place = f"{self.module}, before {self.before}" if self.before else self.module
        kind = "output" if self.what == OUTPUT else "gradient of the parameters"
        said = f"The first module whose {kind} is not finite: {place} ({self.bad:,} of {self.size:,} numbers)."
        return said + (f" Not finite themselves: {', '.join(self.weights)}." if self.weights else "")


def trace_nonfinite(model: nn.Module, loss: Callable[[], Tensor]) -> Trace | None:
    """Run `loss`, a forward pass of `model` to a scalar, and name what first went bad; None: everything is finite.

    Gradients are asked for only if all outputs are finite, and go to no parameter's `.grad`.
    """
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"), _Watch(model).watching() as watch:
        value = loss()
    if watch.found is not None:
        return watch.found
    if not torch.isfinite(value).all():
        return Trace("", LOSS, 1, 1)
    return _bad_gradient(model, value, watch.order) if value.requires_grad else None


class _Watch:
    """Looks at every output of one forward pass. order: names of the modules, as they ended."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: Trace | None = None
        self.order: list[str] = []

    @contextmanager
    def watching(self) -> Generator["_Watch"]:
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if name:
                    hook = module.register_forward_hook(self._hook(name), with_kwargs=True)
                    stack.callback(hook.remove)
                if isinstance(module, PackedLinear):
                    stack.enter_context(self._packed(name, module))
            yield self

    def _hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            self.order.append(name)
            if self.found is None and (bad := _bad(output)):
                parent, _, child = name.rpartition(".")
                inside = any(_bad(value) for value in (*inputs, *named.values()))
                blamed, before = (parent, child) if inside else (name, "")
                self.found = Trace(blamed, OUTPUT, *bad, before, self._weights(blamed))

        return look

    @contextmanager
    def _packed(self, name: str, module: PackedLinear) -> Generator[None]:
        plain = module.project

        def project(x: Tensor) -> Tensor:
            out = plain(x)
            sizes = [layer.out_features for layer in module.projections()]
            for child, part in zip(module.packed, out.split(sizes, -1), strict=True):
                whole = f"{name}.{child}"
                self.order.append(whole)
                if self.found is None and not _bad(x) and (bad := _bad(part)):
                    self.found = Trace(whole, OUTPUT, *bad, weights=self._weights(whole))
            return out

        vars(module)["project"] = project  # stands before the method of its class
        try:
            yield
        finally:
            del vars(module)["project"]

    def _weights(self, name: str) -> tuple[str, ...]:
        """Parameters of a module that are not finite."""
        found = self.model.get_submodule(name).named_parameters(prefix=name)
        return tuple(label for label, parameter in found if _bad(parameter.detach()))


def _bad_gradient(model: nn.Module, value: Tensor, order: list[str]) -> Trace | None:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    bad = {name: count for name, grad in zip(named, gradients, strict=True) if (count := _bad(grad))}
    if not bad:
        return None
    last = {name: place for place, name in enumerate(order)}
    worst = max(bad, key=lambda name: last.get(name.rpartition(".")[0], len(order)))  # not called at all: the head
    return Trace(worst.rpartition(".")[0], GRADIENT, *bad[worst])


def _bad(value: Any) -> tuple[int, int] | None:
    """(numbers that are not finite, all numbers) of a tensor, or of the first bad one of several; None: all finite."""
    if isinstance(value, tuple | list):
        return next((bad for part in value if (bad := _bad(part))), None)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    count = value.numel() - int(torch.isfinite(value).sum())
    return (count, value.numel()) if count else None
