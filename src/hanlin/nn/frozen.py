"""Weights laid out in the order in which they are read: for a model that will not be trained any more, on a CPU.

`freeze` replaces every matrix by a `Product`: Hanlin's own packed kernel (`kernels.linear`), or where that cannot be
built oneDNN on weights that were put into its blocked layout once. One layout serves any number of rows and takes the
place of the plain weights, so memory does not grow; only a matrix that an embedding shares is held twice. A frozen
model can neither be trained nor saved.

One core (Intel, AVX-512 and AMX), x (rows, 768) by W (4096, 768), weights from beyond the L2 cache, microseconds:

    rows              1      8     64     512
    fp32  plain     456  1,362  2,766  17,372
          oneDNN    510    641  2,558  18,618
          kernel    461    507  3,022  21,298
    bf16  plain     409    449    753   2,652
          oneDNN    286    293    457   2,451
          kernel    236    255    474   3,273

Smaller matrices gain more: 192 by 320 in bf16 takes 5 us here and 17 by oneDNN. What a long prompt loses against oneDNN
buys that a row's result does not depend on the rows beside it: batched and alone are equal to the last bit.
"""

import platform

import torch
from torch import Tensor, nn

from hanlin.kernels.linear import PackedProduct, can_pack
from hanlin.nn.linear import Linear, PackedLinear

ROWS_HINT = 16  # oneDNN's layout is chosen for products of so many rows; it is the best of 1, 8, 16, 64 for all of them


class Product:
    """`x W^T + b` over weights in the order of reading: weight (out, in) fp32 or bf16, bias (out,) or None. What an
    adapter may still ask of W and b: lengths (out,) fp32, of the rows of W; bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        kernel = PackedProduct if can_pack(weight.dtype) else OneDnnProduct
        self._run = kernel(weight, bias)
        self.lengths = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)
        self.bias = None if bias is None else bias.detach().clone()

    def __call__(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out), x in the weights' dtype
        return self._run(x)


class OneDnnProduct:
    """The same by oneDNN, the operation that `torch.compile` uses for frozen weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
        self._bias = None if bias is None else bias.detach().clone()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


@torch.no_grad()
def freeze(model: nn.Module) -> bool:
    """Turn every `Linear` and `PackedLinear` of a model into its `Product`; False where that cannot be done here.

    The plain weights are given back (their parameters stay, on the meta device, with name and shape), except one that
    an embedding shares.
    """
    parameters = list(model.parameters())
    if not can_freeze() or any(p.device.type != "cpu" or p.dtype not in DTYPES for p in parameters):
        return False
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    inside: set[nn.Module] = set()
    for module in list(model.modules()):
        if isinstance(module, PackedLinear):
            layers = module.projections()
            biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
            module.product = Product(module.joined_weight(), torch.cat(biases) if biases else None)
            module.forget()
            inside.update(layers)
            for layer in layers:
                _give_back(layer, shared)
    for module in list(model.modules()):
        if isinstance(module, Linear) and module not in inside:
            module.product = Product(module.weight, module.bias)
            _give_back(module, shared)
    return True


def can_freeze() -> bool:
    """With the kernels, or on x86 with oneDNN; elsewhere nobody has measured oneDNN."""
    if can_pack(torch.float32):
        return True
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


DTYPES = (torch.float32, torch.bfloat16)


def _give_back(layer: nn.Linear, shared: set[int]) -> None:
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if id(parameter) not in shared:
            setattr(layer, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
