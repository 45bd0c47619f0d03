"""Linear layers that compute in the dtype of their input, and projections that share one buffer.

Master weights stay in their own dtype (fp32 in training); `Linear` casts them to the activation's dtype on use, so
mixed precision is one visible line and not an autocast context.

`pack` lays the weights of several projections of the same input (q, k, v; gate, up) end to end in one buffer, of which
the named parameters are views: one matrix product instead of three, while the checkpoint keeps the Hugging Face names.

A `branch` is what an adapter (`hanlin.tune`) adds to the output of a projection, alone or in a packed product.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.kernels.rows import addressed


class Linear(nn.Linear):
    """`x W^T + b` with W and b cast to the dtype of x (`input`). product: a faster form of it (`nn.frozen`); branch: of
    x and of that, is added to it (in the branch's own memory; an autograd graph may hold the product). A packed parent
    learns of a branch by `PackedLinear.note_branches`."""

    product: Callable[[Tensor], Tensor] | None = None
    branch: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.product is not None:
            out = self.product(input)
        else:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            out = F.linear(input, self.weight.to(input.dtype), bias)
        return out if self.branch is None else self.branch(input, out).add_(out)


class PackedLinear(nn.Module):
    """Several `Linear`s over the same input, computed as one product.

    A subclass (attention, feed-forward) owns the named `Linear`s as children and calls
    `project(x, self.q_proj, self.k_proj, self.v_proj)`. Moving or casting the module packs anew.
    """

    packed: tuple[str, ...] = ()  # names of the children that share the buffer, in order
    product: Callable[[Tensor], Tensor] | None = None  # a faster form of `project` (`nn.frozen`)
    branched: bool = False  # whether a child has a branch

    def __init__(self) -> None:
        super().__init__()
        self._buffer_of: dict[str, Tensor] = {}

    def pack(self) -> None:
        """Lay the children's weights (and biases) end to end; the parameters become views of the buffer."""
        self._buffer_of = {}
        layers = [self.get_submodule(name) for name in self.packed]
        for kind in ("weight", "bias"):
            parameters = [getattr(layer, kind) for layer in layers]
            if any(p is None or p.is_meta for p in parameters):  # what has no memory is packed when it gets some
                continue
            self.lay_in(kind, torch.cat([p.data for p in parameters]))

    def lay_in(self, kind: str, buffer: Tensor) -> None:
        """The children's `kind` (weight or bias) become views of `buffer` (rows of all of them, ...), which holds their
        values and may itself be a view of something larger."""
        parameters = [getattr(layer, kind) for layer in self.projections()]
        for parameter, part in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
        self._buffer_of[kind] = buffer

    def projections(self) -> list[Linear]:
        """The named children, in the order of the buffer."""
        return [cast(Linear, getattr(self, name)) for name in self.packed]

    def joined_weight(self) -> Tensor:
        """The weights of all children, end to end: the buffer itself, where they are still views of it."""
        return self._joined("weight", [layer.weight for layer in self.projections()])

    def forget(self) -> None:
        """Give the buffer back."""
        self._buffer_of = {}

    def project(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., sum of the children's outputs), one matrix product."""
        if self.product is not None:
            out = self.product(x)
        else:
            layers = self.projections()
            weight = self._joined("weight", [layer.weight for layer in layers])
            bias = None if layers[0].bias is None else self._joined("bias", [layer.bias for layer in layers])
            out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return self._branches(x, out).add_(out) if self.branched else out

    def note_branches(self) -> None:
        """To be called when a child got or lost its branch."""
        self.branched = any(layer.branch is not None for layer in self.projections())

    def _branches(self, x: Tensor, out: Tensor) -> Tensor:
        """What the children's branches add, side by side; zeros for a child without one."""
        layers = self.projections()
        parts = zip(layers, out.split([layer.out_features for layer in layers], -1), strict=True)
        return torch.cat([
            torch.zeros_like(part) if layer.branch is None else layer.branch(x, part) for layer, part in parts
        ], -1)  # fmt: skip

    def _joined(self, kind: str, parameters: Sequence[Tensor]) -> Tensor:
        buffer = self._buffer_of.get(kind)
        if torch.compiler.is_compiling():  # a storage cannot be traced: the graph would be cut in every layer
            return torch.cat(list(parameters))
        if buffer is None or not _are_views(buffer, parameters):  # e.g. sharded or assigned from outside
            return torch.cat(list(parameters))
        if not torch.is_grad_enabled():
            return buffer
        return _Join.apply(buffer, *parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        super()._apply(fn, recurse)
        self.pack()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        from copy import deepcopy

        clone.__dict__.update({k: deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_buffer_of"})
        clone._buffer_of = {}
        clone.pack()
        return clone


class _Join(torch.autograd.Function):
    """The buffer as a function of its views: no copy forward, the gradient is handed out in slices backward."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sizes = [len(p) for p in parameters]
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradients[0].split(ctx.sizes)


def _are_views(buffer: Tensor, parameters: Sequence[Tensor]) -> bool:
    storage, offset = buffer.untyped_storage()._cdata, buffer.storage_offset()
    for p in parameters:
        if not addressed(p.data) or p.dtype != buffer.dtype:
            return False
        if p.untyped_storage()._cdata != storage or p.storage_offset() != offset:
            return False
        offset += p.numel()
    return True
