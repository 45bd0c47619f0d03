"""Scaling a query by its position, for layers that attend over more keys than they were trained on.

Llama 4's layers without positions: q * (1 + scale * ln(1 + floor((position + 1) / floor))), "inference-time temperature
tuning" after arXiv:2501.19399. (Qwen's log_c n is `nn.dual_chunk.log_n_scale`.)
"""

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.wide import wide


def temperature_scale(positions: Tensor, *, floor: int, scale: float) -> Tensor:
    """positions (...) from 0, integers or fp64 -> fp32 or fp64 (...), 1 below `floor - 1`."""
    if floor < 1:
        raise HanlinError(f"temperature_scale: floor is {floor}, expected a length of at least 1 token.")
    steps = torch.div(wide(positions) + 1.0, floor, rounding_mode="floor")
    return torch.log1p(steps) * scale + 1.0
