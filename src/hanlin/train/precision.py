"""Mixed precision without autocast: fp32 weights, narrow activations (`Transformer.compute_dtype`), fp32 gradients.

    fp32   everything
    bf16   activations in bf16, which has fp32's range
    fp16   activations in fp16, whose small gradients need a loss scale (`train.scaling`)
    fp8    as bf16, the projections' products in 8 bits (`nn.float8`)

Every `Linear` casts its weight on use; norms, softmax and loss keep fp32 statistics.
"""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from hanlin.core.device import choose_dtype
from hanlin.core.errors import HanlinError
from hanlin.models.transformer import Transformer
from hanlin.nn.float8 import refuse_without_units, use_float8, use_plain
from hanlin.train.choices import Offload, Recompute
from hanlin.train.offload import Offload as Moving
from hanlin.train.recompute import recompute_layers, remember_layers

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Precision:
    """name: fp32, bf16, fp16 or fp8, as resolved. tf32: fp32 products of a GPU in TF32."""

    name: str
    tf32: bool = False

    @classmethod
    def choose(cls, wanted: str, device: torch.device, *, tf32: bool = False) -> "Precision":
        """`wanted`, with `auto` resolved by measuring. What the device cannot do is a `HanlinError`."""
        dtype = choose_dtype(wanted, device)
        if wanted == "fp8":
            refuse_without_units(device)
        if tf32:
            _refuse_without_tf32(device)
        return cls("fp8" if wanted == "fp8" else NAMES[dtype], tf32)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Of the activations; None: the weights' own, which are fp32 (or fp64, in tests)."""
        return {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(self.name)

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a loss scale."""
        return self.name == "fp16"

    @property
    def products(self) -> torch.dtype | None:
        """Of Muon's Newton-Schulz iteration; None: the parameters' own. fp16 has not the range for it."""
        return torch.bfloat16 if self.name in ("bf16", "fp8") else None


def widen_weights(model: Transformer) -> None:
    """fp32 weights where trainable ones are of half precision: small updates would be lost in 8 or 11 bits."""
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters() if p.requires_grad):
        model.float()


@contextmanager
def training_mode(
    model: Transformer,
    *,
    precision: Precision,
    compile: bool = False,
    recompute: Recompute | None = None,
    offload: Offload | None = None,
) -> Generator[None]:
    """The model as training wants it; afterwards as it was before, without gradients."""
    was, dtype, compiled = model.training, model.compute_dtype, model._compiled_call_impl
    if offload is not None and compile:
        raise HanlinError(
            "train.offload moves what autograd keeps, which compiled code does by itself. Leave out "
            "one of train.offload and train.compile."
        )
    moved = Moving(model.parameters(), above=offload.above).saving() if offload is not None else nullcontext()
    with tf32_products(precision.tf32), moved:
        try:
            model.train()
            model.compute_dtype = precision.compute_dtype
            if precision.name == "fp8":
                use_float8(model)
            if recompute is not None:
                recompute_layers(model, recompute)
            if compile:
                model.compile()
            yield
        finally:
            model.train(was)
            model.compute_dtype, model._compiled_call_impl = dtype, compiled
            use_plain(model)
            remember_layers(model)
            for parameter in model.parameters():
                parameter.grad = None


@contextmanager
def tf32_products(on: bool) -> Generator[None]:
    """fp32 matrix products of NVIDIA GPUs in TF32 (8 bits of exponent, 10 of fraction), or exact; then as before."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [s.fp32_precision for s in settings]
    if on:
        for s in settings:
            s.fp32_precision = "tf32"
    try:
        yield
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value


def _refuse_without_tf32(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise HanlinError(
            f"train.tf32 is for NVIDIA GPUs of compute capability 8.0 and up; the device is `{device}`. Leave it out."
        )
