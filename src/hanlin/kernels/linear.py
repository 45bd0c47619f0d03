"""`x W^T + b` over weights packed once into the order in which they are read (`native/linear.cpp`).

Tiles of 32 outputs are each one sequential stream, read once for up to 8 rows (fp32, AVX-512) or 32 rows (bf16, AMX).
An output is the same chain of multiply-adds in a batch of any size.
"""

import ctypes

import torch
from torch import Tensor

from hanlin.kernels.library import INTEGER, POINTER, function, library


class Matrix(ctypes.Structure):
    """As in native/linear.cpp."""

    _fields_ = [("packed", POINTER), ("bias", POINTER), ("inputs", INTEGER), ("outputs", INTEGER)]


class PackedProduct:
    """weight (out, in) fp32 or bf16, bias (out,) or None: x (..., in) -> (..., out) in the weights' dtype.

    It keeps a packed copy of the weights, padded to 32 outputs, and nothing of the given ones.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.outputs, self.inputs = weight.shape
        self.dtype = weight.dtype
        loaded, pack = library(), function("pack", weight.dtype)
        if loaded is None or pack is None:
            raise ValueError(f"there is no kernel for {weight.dtype} here; ask `can_pack` first")
        loaded.long.hanlin_packed_size.restype = INTEGER
        size = loaded.long.hanlin_packed_size(INTEGER(self.inputs), INTEGER(self.outputs), weight.itemsize)
        self._packed = torch.empty(size, dtype=weight.dtype)
        loaded.long.hanlin_huge_pages(POINTER(self._packed.data_ptr()), INTEGER(self._packed.nbytes))
        weight = weight.detach().contiguous()
        pack(weight.data_ptr(), self.inputs, self.outputs, self._packed.data_ptr())
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self._matrix = Matrix(
            self._packed.data_ptr(), None if self._bias is None else self._bias.data_ptr(), self.inputs, self.outputs
        )
        self._address = ctypes.addressof(self._matrix)
        run = function("linear", weight.dtype)
        if run is None:
            raise ValueError(f"There is no kernel for {weight.dtype}; ask `can_pack` first.")
        self._run = run

    def __call__(self, x: Tensor) -> Tensor:
        shape = x.shape
        if x.dtype != self.dtype or shape[-1] != self.inputs:
            raise ValueError(f"x is {x.dtype} of shape {tuple(shape)}; expected {self.dtype} of (..., {self.inputs})")
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*shape[:-1], self.outputs))
        self._run(self._address, x.data_ptr(), y.data_ptr(), x.numel() // self.inputs)
        return y

    def __deepcopy__(self, memo: dict) -> "PackedProduct":
        return self  # its weights never change


def can_pack(dtype: torch.dtype) -> bool:
    return function("pack", dtype) is not None


def linear_twin(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `PackedProduct` computes: sums in fp32, one rounding at the end."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)
