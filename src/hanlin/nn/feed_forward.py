"""The feed-forward of a layer, plain or gated (GLU and its kin, arXiv:2002.05202).

    plain   down( f(up(x)) )                       ReLU, GELU, squared ReLU, ...
    gated   down( f(gate(x)) * up(x) )             f = sigmoid: GLU, gelu: GeGLU, silu: SwiGLU, identity: bilinear

`limit` is gpt-oss's gate (`clamped_swiglu`). SwiGLU has a backward of its own, which recomputes silu.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hanlin.core.errors import HanlinError
from hanlin.kernels import rows, training
from hanlin.nn.activations import Activation, activation, clamped_swiglu
from hanlin.nn.dropout import Dropout
from hanlin.nn.linear import Linear, PackedLinear


class FeedForward(PackedLinear):
    """gate_proj and up_proj are one product over a shared buffer; a plain feed-forward has up_proj alone.

    dropout: behind the activation (T5; BART's `activation_dropout`); output_dropout: behind down_proj (BERT, T5, BART).
    limit: clamps gate and up as gpt-oss does, which has one gate: `gated`, `activation="silu"`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
        limit: float | None = None,
    ) -> None:
        super().__init__()
        self._activate = gate_function(activation, gated=gated, limit=limit)
        self.packed = ("gate_proj", "up_proj") if gated else ("up_proj",)
        if gated:
            self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)
        self.dropout = Dropout(dropout) if dropout else None
        self.output_dropout = Dropout(output_dropout) if output_dropout else None
        self.pack()

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        h = self._activate(self.project(x))  # (..., hidden)
        if self.dropout is not None:
            h = self.dropout(h)
        y = self.down_proj(h)
        return y if self.output_dropout is None else self.output_dropout(y)


class SwiGLU(FeedForward):
    """The feed-forward of Llama and Qwen: down( silu(gate(x)) * up(x) )."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__(width, hidden, bias=bias)


def gate_function(name: str, *, gated: bool = True, limit: float | None = None) -> Callable[[Tensor], Tensor]:
    """What stands between the projections: (..., 2 * hidden), gate first, -> (..., hidden) if gated, else
    (..., hidden) -> (..., hidden). name: of `nn.activations`; limit: gpt-oss's clamp."""
    if limit is not None:
        if not gated or name not in ("silu", "swish"):
            kind = "gated" if gated else "plain"
            raise HanlinError(f"`limit` belongs to a gated feed-forward with silu; this one is {kind} with {name!r}.")
        return partial(_gated, join=partial(clamped_swiglu, limit=limit))
    function = activation(name)
    if not gated:
        return function
    return swiglu if function is F.silu else partial(_gated, join=partial(_product, function))


def _gated(gate_up: Tensor, *, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return join(gate, up)


def _product(function: Activation, gate: Tensor, up: Tensor) -> Tensor:
    return function(gate) * up


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2 * hidden), gate first -> silu(gate) * up (..., hidden)."""
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate_up)
    gated = rows.swiglu(gate_up)
    return _gate(gate_up) if gated is None else gated


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gated = training.swiglu(gate_up)
        return _gate(gate_up) if gated is None else gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gate_up,) = ctx.saved_tensors
        grad = gradients[0]
        if (found := training.swiglu_backward(gate_up, grad)) is not None:
            return (found,)
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return (out,)
