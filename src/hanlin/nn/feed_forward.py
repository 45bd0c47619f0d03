"""Gated feed-forward (SwiGLU, arXiv:2002.05202): down( silu(gate(x)) * up(x) )."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hanlin.nn.linear import Linear, PackedLinear


class SwiGLU(PackedLinear):
    """gate and up are one product over a shared buffer; the activation's backward recomputes silu."""

    packed = ("gate_proj", "up_proj")

    def __init__(self, width: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)
        self.pack()

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        return self.down_proj(swiglu(self.project(x)))


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2 * hidden), gate first -> silu(gate) * up (..., hidden)."""
    return _SwiGLU.apply(gate_up) if torch.is_grad_enabled() else _gate(gate_up)


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gate(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gate_up,) = ctx.saved_tensors
        grad = gradients[0]
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return (out,)
