"""Matrix products in 8-bit floating point for training (arXiv:2209.05433): twice the products of bf16 on Hopper.

    quantise(t)   s = most / max|t|,  t8 = round(t * s)         one scale a tensor, from the numbers as they are
    forward       y  = (x8 W8^T) / (s_x s_W) + b                e4m3: 4 bits of exponent, 3 of fraction, most 448
    backward      dx = (g8 W8)   / (s_g s_W)                    gradients in e5m2: more range, most 57,344
                  dW = (g8^T x8) / (s_g s_x)

Weights stay fp32 (or bf16) and activations bf16; what is kept for the backward pass are the 8-bit copies. The head, the
router and the experts' grouped products stay as they are. The units want both widths of a matrix to be multiples of 16,
and the backward pass the number of tokens, to which rows of zeros are added.

With tensor parallelism each rank takes the scale of its own share.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hanlin.core.errors import HanlinError
from hanlin.nn.linear import Linear, PackedLinear

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
STEP = 16  # the units' granularity along every axis
TINY = 1e-24  # the largest number is at least this: zeros have no scale, and a product of two scales is no zero
Multiply = Callable[[Tensor, Tensor, Tensor, torch.dtype, bool], Tensor]


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x of any shape -> the same in 8 bits, and the fp32 scalar that turns it back: x ~ eight.float() * inverse."""
    most = torch.finfo(dtype).max
    inverse = x.detach().abs().amax().float().clamp_min(TINY) / most
    eight = (x.float() / inverse).clamp(-most, most).to(dtype)  # torch's cast does not saturate
    return eight, inverse


def multiply(a: Tensor, b: Tensor, inverse: Tensor, out: torch.dtype, fast: bool) -> Tensor:
    """a (n, k) by rows times b (k, m) by columns, both in 8 bits, times `inverse` -> (n, m), by the device's units.

    fast: sums in fewer bits than fp32, which is enough for a forward pass.
    """
    one = torch.ones((), dtype=torch.float32, device=a.device)
    return torch._scaled_mm(a, b, scale_a=inverse, scale_b=one, out_dtype=out, use_fast_accum=fast)


def multiply_emulated(a: Tensor, b: Tensor, inverse: Tensor, out: torch.dtype, fast: bool) -> Tensor:
    """`multiply` on any device: the 8-bit numbers as fp32, exactly, and fp32 products."""
    return ((a.float() @ b.float()) * inverse).to(out)


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, by: Multiply = multiply) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out) in the dtype of x, with gradients."""
    out = _Float8.apply(x.reshape(-1, x.shape[-1]), weight, by)
    out = out.view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias.to(out.dtype)


class Float8Product:
    """The `product` of a `Linear` or `PackedLinear` that goes on learning."""

    def __init__(self, module: Linear | PackedLinear, by: Multiply) -> None:
        self._module, self._by = module, by

    def __call__(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        module = self._module
        if isinstance(module, Linear):
            return float8_linear(x, module.weight, module.bias, by=self._by)
        biases: list[Tensor] = [layer.bias for layer in module.projections() if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        return float8_linear(x, module.joined_weight(), bias, by=self._by)


def use_float8(model: nn.Module, *, emulate: bool = False) -> list[nn.Module]:
    """Let every projection of `model` multiply in 8 bits -> the modules that do; `use_plain` undoes it.

    Left out: what has one output (a gate of shared experts), and matrices that an embedding shares. emulate: on a
    device without such units, as slow as it is. `HanlinError` where the device has none, or a width does not fit.
    """
    if not emulate:
        refuse_without_units(next(model.parameters()).device)
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    chosen: list[tuple[str, Linear | PackedLinear]] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            inside.update(module.projections())
            chosen.append((name, module))
    head = getattr(model, "lm_head", None)  # its products are the loss's (`nn.chunked_head`)
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or module is head or module in inside:
            continue
        if module.out_features > 1 and id(module.weight) not in shared:
            chosen.append((name, module))
    for name, module in chosen:
        _refuse_misfit(name, module)
    by = multiply_emulated if emulate else multiply
    for _, module in chosen:
        module.product = Float8Product(module, by)
    return [module for _, module in chosen]


def use_plain(model: nn.Module) -> None:
    """Take the products of `use_float8` away again."""
    for module in model.modules():
        if isinstance(module, Linear | PackedLinear) and isinstance(module.product, Float8Product):
            module.product = None


def refuse_without_units(device: torch.device) -> None:
    """`HanlinError` unless the device multiplies 8-bit floats itself (NVIDIA: compute capability 8.9 and up)."""
    if device.type != "cuda":
        raise HanlinError(
            f"Precision fp8 needs a GPU with 8-bit floating-point units (Hopper, Ada, Blackwell); the device is "
            f"`{device}`. Use bf16."
        )
    if torch.version.hip is not None:
        raise HanlinError("Precision fp8 is written for NVIDIA's e4m3 and e5m2; this PyTorch is for ROCm. Use bf16.")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise HanlinError(
            f"Precision fp8 needs compute capability 8.9 or more (Hopper, Ada, Blackwell); "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}. Use bf16."
        )


def _refuse_misfit(name: str, module: Linear | PackedLinear) -> None:
    if module.product is not None and not isinstance(module.product, Float8Product):
        raise HanlinError(f"{name} is frozen for generation (`nn.frozen`); it cannot learn in fp8.")
    layers = module.projections() if isinstance(module, PackedLinear) else [module]
    rows, columns = sum(layer.weight.shape[0] for layer in layers), layers[0].weight.shape[1]
    if rows % STEP or columns % STEP:
        raise HanlinError(
            f"Precision fp8 needs widths that are multiples of {STEP}; {name} multiplies by a matrix of {rows} x "
            f"{columns} numbers. Use bf16, or other widths."
        )


class _Float8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, by: Multiply) -> Tensor:  # (n, in), (out, in) -> (n, out)
        x8, x_inverse = quantise(x, FORWARD)
        w8, w_inverse = quantise(weight, FORWARD)
        ctx.save_for_backward(x8, x_inverse, w8, w_inverse)
        ctx.by, ctx.dtypes = by, (x.dtype, weight.dtype)
        return by(x8, w8.t(), x_inverse * w_inverse, x.dtype, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x8, x_inverse, w8, w_inverse = ctx.saved_tensors
        of_x, of_weight = ctx.dtypes
        g8, g_inverse = quantise(grad, BACKWARD)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            columns = w8.t().contiguous().t()  # (out, in), by columns
            grad_x = ctx.by(g8.contiguous(), columns, g_inverse * w_inverse, of_x, False)
        if ctx.needs_input_grad[1]:
            rows = _filled(g8).t().contiguous()  # (out, n)
            columns = _filled(x8).t().contiguous().t()  # (n, in), by columns
            wide = torch.float32 if of_weight != torch.bfloat16 else torch.bfloat16
            grad_weight = ctx.by(rows, columns, g_inverse * x_inverse, wide, False).to(of_weight)
        return grad_x, grad_weight, None


def _filled(x: Tensor) -> Tensor:
    """x (n, a) with rows of zeros up to a multiple of `STEP`."""
    missing = -len(x) % STEP
    if not missing:
        return x
    more = torch.zeros(missing, x.shape[1], dtype=torch.uint8, device=x.device).view(x.dtype)
    return torch.cat([x.view(torch.uint8), more.view(torch.uint8)]).view(x.dtype)
