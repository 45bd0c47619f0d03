"""What an operation takes on a CPU besides what it gives back, for as long as it runs. Found by running one alone.

bf16 product (m, k) (k, n)   oneDNN copies a block of the right matrix, 2 k n bytes with k <= 2048 and n <= 1024
"""

from typing import Any

import torch

aten = torch.ops.aten


def hidden_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that `func` holds for a moment: 0 for most."""
    if func in (aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm.out) and out.dtype == torch.bfloat16:
        left, right = args[-2:] if "mm" in func.name() else args
        k, n = left.shape[-1], right.shape[-1]
        return 2 * min(k, 2048) * min(n, 1024 if k <= 512 else 512)
    return 0
