"""Optimiser states in 8 bits a number (arXiv:2110.02861): a quarter of the memory, the same training.

    a block of 256 numbers    x_i ~ largest |x| of the block  *  code[index_i]          1 byte each + 4 for the block

The code is a dynamic tree: with e = 0 ... 6 leading zeros come numbers of the size 10^(e - 6), spaced evenly by the
bits that are left, 2^e of them (twice as many where no sign is needed), so that small numbers keep a relative error.

    signed     0, 1 and +-10^(e-6) * the centres of 2^e     equal parts of [0.1, 1]     first moments
    unsigned   0, 1 and   10^(e-6) * the centres of 2^(e+1) equal parts of [0.1, 1]     second moments

A second moment above zero never becomes zero: the step is divided by its root. Blocks begin with the tensor; for a
flat share of a parameter (ZeRO) with the share, so states on other numbers of ranks agree to their rounding only.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
CHUNK = BLOCK << 14  # numbers whose states are in fp32 at a time


@cache
def code(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers in [-1, 1] or [0, 1] that a byte can stand for, ascending, fp32."""
    numbers = [0.0, 1.0]
    for e in range(7):
        parts = 2**e if signed else 2 ** (e + 1)
        centres = [10.0 ** (e - 6) * (0.1 + 0.9 * (i + 0.5) / parts) for i in range(parts)]
        numbers += centres + [-c for c in centres] if signed else centres
    return torch.tensor(sorted(numbers), dtype=torch.float64).float().to(device)


def quantise(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """x of any shape -> nearest codes, uint8 like x, and the largest magnitude of each block, fp32 (blocks,)."""
    flat = x.detach().reshape(-1).float()
    blocks = _blocks(flat)
    largest = blocks.abs().amax(1)
    relative = blocks / torch.where(largest > 0, largest, 1.0)[:, None]
    numbers = code(signed, x.device)
    indices = torch.bucketize(relative, (numbers[1:] + numbers[:-1]) / 2)
    if not signed:
        indices = torch.where(relative > 0, indices.clamp(min=1), indices)
    return indices.to(torch.uint8).view(-1)[: len(flat)].view(x.shape), largest


def dequantise(codes: Tensor, largest: Tensor, *, signed: bool) -> Tensor:
    """What `quantise` wrote -> fp32, shaped like codes."""
    flat = code(signed, codes.device)[codes.reshape(-1).int()]
    return (_blocks(flat) * largest[:, None]).view(-1)[: len(flat)].view(codes.shape)


def empty_state(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes and magnitudes of zeros."""
    zero = int((code(signed, x.device) == 0).nonzero())
    codes = torch.full(x.shape, zero, dtype=torch.uint8, device=x.device)
    return codes, torch.zeros(-(-x.numel() // BLOCK), device=x.device)


def _blocks(flat: Tensor) -> Tensor:
    """(n,) -> (blocks, BLOCK), zeros behind the last number."""
    count = -(-len(flat) // BLOCK)
    return F.pad(flat, (0, count * BLOCK - len(flat))).view(count, BLOCK)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) whose moments are held as above and computed in fp32; element by element."""

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients as they are; a closure is not supported and refused."""
        if closure is not None:
            raise ValueError("AdamW8bit takes no closure.")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.reshape(-1), group)

    def _update(self, parameter: Tensor, gradients: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                state[name], state[f"{name}_scale"] = empty_state(parameter, signed=signed)
        state["step"] += 1
        step, (beta1, beta2), lr = float(state["step"]), group["betas"], group["lr"]
        weights = parameter.reshape(-1)  # a view, where it can be one
        moments = [(state[n].view(-1), state[f"{n}_scale"], signed) for n, signed in _MOMENTS]
        for start in range(0, len(weights), CHUNK):
            part, blocks = slice(start, start + CHUNK), slice(start // BLOCK, (start + CHUNK) // BLOCK)
            m, v = (dequantise(codes[part], scale[blocks], signed=signed) for codes, scale, signed in moments)
            gradient = gradients[part].float()
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
            weights[part].mul_(1 - lr * group["weight_decay"]).sub_(m / root, alpha=lr / (1 - beta1**step))
            for (codes, scale, signed), moment in zip(moments, (m, v), strict=True):
                codes[part], scale[blocks] = quantise(moment, signed=signed)
        if weights.data_ptr() != parameter.data_ptr():
            parameter.copy_(weights.view_as(parameter))


_MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))
