"""Attention of whole sequences for training, forward and backward (`native/train_attention.cpp`).

It takes queries, keys and values where the projection left them, keeps no probabilities, and gives the gradients in the
same layout: neither copies of heads nor O(T^2) memory.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from hanlin.kernels.library import INTEGER, REAL, library
from hanlin.kernels.rows import kernel


class Shape(ctypes.Structure):
    """As in native/train_attention.cpp."""

    _fields_ = [
        *((name, INTEGER) for name in ("rows", "length", "heads", "kv_heads", "width", "value_width")),
        *((name, INTEGER) for name in ("q_row", "q_token", "k_row", "k_token", "v_row", "v_token")),
        *((name, INTEGER) for name in ("bias_row", "bias_head")),
        ("scale", REAL), ("causal", ctypes.c_int32),
    ]  # fmt: skip


def usable(q: Tensor) -> bool:
    """Whether there is a kernel for such a tensor, and units on this CPU that make it faster than torch's products."""
    return kernel("train_attention", q) is not None and pays(q.dtype)


def shape_of(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, *, causal: bool) -> Shape:
    """What `attend` needs to know of tensors that `laid_out` has laid out: q (rows, T, heads, D), k (rows, T, kv_heads,
    D), v (rows, T, kv_heads, V); bias (rows or 1, heads or 1, T, T); causal: no query sees a later key."""
    rows, length, heads, width = q.shape
    steps = (0, 0)
    if bias is not None:
        steps = (bias.stride(0) if len(bias) > 1 else 0, bias.stride(1) if bias.shape[1] > 1 else 0)
    strides = [step for x in (q, k, v) for step in x.stride()[:2]]
    return Shape(rows, length, heads, k.shape[2], width, v.shape[3], *strides, *steps, scale, causal)


def laid_out(x: Tensor) -> Tensor:
    """x (rows, T, heads, D) with the heads of a token behind each other; slices of a projection stay where they are."""
    packed = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x if packed else x.contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, shape: Shape) -> tuple[Tensor, Tensor]:
    """-> (rows, T, heads, V) and the logarithm of each query's sum, fp32 (rows, heads, T)."""
    run = kernel("train_attention", q)
    assert run is not None
    out = q.new_empty(*q.shape[:3], v.shape[3])
    norms = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    run(
        ctypes.addressof(shape), q.data_ptr(), k.data_ptr(), v.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), norms.data_ptr(),
    )  # fmt: skip
    return out, norms


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, shape: Shape, out: Tensor, norms: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, contiguous; everything as `attend` had and gave it."""
    run = kernel("train_attention_backward", q)
    assert run is not None
    grad = grad.to(q.dtype).contiguous()
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    run(
        ctypes.addressof(shape), q.data_ptr(), k.data_ptr(), v.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), norms.data_ptr(), grad.data_ptr(), grad_q.data_ptr(), grad_k.data_ptr(), grad_v.data_ptr(),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


@cache
def pays(dtype: torch.dtype) -> bool:
    """Whether this CPU has the units that make the kernel faster than torch's products."""
    loaded = library()
    return loaded is not None and bool(loaded.long.hanlin_train_attention_pays(dtype.itemsize))
