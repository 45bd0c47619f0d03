"""Which precision decodes a model faster on this CPU. bf16 reads half the bytes, which decides once the weights exceed
the caches; a small model stays in them, and a CPU without bf16 units emulates every product. So it is measured, on the
model's own matrices: one token through up to 256 MB of them, a few times in each precision.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.device import choose_dtype
from hanlin.models.transformer import Transformer

SAMPLE = 64 * 2**20  # weights: 256 MB in fp32, more than any cache, and a copy of a fraction of a second
GAIN = 1.15  # the rest of a step is no faster in bf16, and fp32 is more exact


@torch.inference_mode()
def faster_dtype(model: Transformer) -> torch.dtype:
    """fp32 or bf16 for a model on a CPU, by measuring; bf16 on a GPU that has it. The model is left as it was."""
    if model.device.type != "cpu":
        return choose_dtype("auto", model.device)
    sample: list[Tensor] = []
    room = SAMPLE
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.numel() <= room:
            sample.append(parameter)
            room -= parameter.numel()
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = [weight.to(dtype) for weight in sample]
        inputs = {weight.shape[1]: torch.ones(1, weight.shape[1], dtype=dtype) for weight in weights}
        seconds = []
        for _ in range(4):  # the first sets kernels up
            start = time.perf_counter()
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)
            seconds.append(time.perf_counter() - start)
        best[dtype] = min(seconds)
    return torch.bfloat16 if best[torch.float32] > GAIN * best[torch.bfloat16] else torch.float32
