"""Cross-entropy over rows of logits and its slope, in one visit of each row (`native/cross_entropy.cpp`)."""

import torch
from torch import Tensor

from hanlin.kernels.rows import kernel


def cross_entropy(
    z: Tensor, targets: Tensor, *, smoothing: float, z_loss: float, wanted: bool
) -> tuple[Tensor, Tensor | None] | None:
    """z (n, vocabulary) fp32 or bf16, targets (n,) int64 -> (sum of costs, fp32; the slope in the memory of z, or None
    where it is not wanted). The equation is in `nn.losses`. None where the kernel cannot be used.

    Raises `IndexError` for a target outside of the vocabulary.
    """
    run = kernel("cross_entropy", z)
    if run is None or targets.dtype != torch.int64 or not z.is_contiguous():
        return None
    targets, cost = targets.contiguous(), z.new_empty(len(z), dtype=torch.float32)
    if len(z):
        low, high = map(int, torch.aminmax(targets))
        if low < 0 or high >= z.shape[1]:
            raise IndexError(f"a target of {low if low < 0 else high}, but there are {z.shape[1]} tokens")
        run(z.data_ptr(), targets.data_ptr(), *z.shape, smoothing, z_loss, int(wanted), cost.data_ptr())
    return cost.sum(), z if wanted else None


def cross_entropy_twin(z: Tensor, targets: Tensor, *, smoothing: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """By autograd, in fp32: (sum of costs, slope fp32)."""
    with torch.enable_grad():
        wide = z.detach().float().requires_grad_()
        log_norm = wide.logsumexp(-1)
        picked = wide.gather(-1, targets[:, None])[:, 0]
        cost = log_norm - (1 - smoothing) * picked - smoothing * wide.mean(-1) + z_loss * log_norm.square()
        return cost.sum().detach(), torch.autograd.grad(cost.sum(), wide)[0]
