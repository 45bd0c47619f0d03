"""Products of rows that lie sorted by group, each group with a matrix of its own.

    rows      |--- 0 ---|- 1 -|---- 3 ----|              offsets: the end of each group; group 2 is empty here
    grouped_product   y[r] = x[r] W[group of r]          (n, a), (groups, a, b) -> (n, b)
    grouped_outer     G[g] = sum of x[r]^T y[r] over g   (n, a), (n, b)         -> (groups, a, b)

torch's `grouped_mm` does it in one call and never reads the matrix of an empty group. It has no fp64 and wants rows
whose bytes divide by 16; elsewhere the groups are padded to the fullest one and multiplied as a batch: exact, but as
slow and as large as the fullest group times their number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x (n, a) sorted by group, weight (groups, a, b), offsets (groups,) int32 with last one n -> (n, b)."""
    if _can_group(x, weight.shape[1], weight.shape[2]):
        return F.grouped_mm(x, weight, offs=offsets)
    slots, longest = _slots(offsets, len(x))
    padded = torch.bmm(_pad(x, slots, len(offsets), longest), weight)  # (groups, longest, b)
    return padded.flatten(0, 1).index_select(0, slots)


def grouped_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """x (n, a), y (n, b), both sorted by group -> (groups, a, b): x^T y of each group, zeros where it is empty."""
    if _can_group(x, x.shape[1], y.shape[1]):
        return F.grouped_mm(x.t(), y, offs=offsets)
    slots, longest = _slots(offsets, len(x))
    left, right = (_pad(t, slots, len(offsets), longest) for t in (x, y))
    return torch.bmm(left.transpose(1, 2), right)


def _can_group(x: Tensor, *widths: int) -> bool:
    aligned = all(width * x.element_size() % 16 == 0 for width in widths)
    return aligned and x.dtype in GROUPED_DTYPES and hasattr(F, "grouped_mm")


def _slots(offsets: Tensor, rows: int) -> tuple[Tensor, int]:
    """Where each row lies when every group has the room of the longest one: slots (n,), that room."""
    starts = F.pad(offsets[:-1], (1, 0))
    longest = int((offsets - starts).max())
    places = torch.arange(rows, device=offsets.device)
    group = torch.searchsorted(offsets, places.to(offsets.dtype), right=True)
    return group * longest + places - starts[group], longest


def _pad(x: Tensor, slots: Tensor, groups: int, longest: int) -> Tensor:  # (n, a) -> (groups, longest, a)
    return x.new_zeros(groups * longest, x.shape[1]).index_copy_(0, slots, x).view(groups, longest, -1)
