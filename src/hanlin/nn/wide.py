"""Where low precision widens: sums over many numbers (statistics, softmax, log-probabilities) are fp32 at least."""

from torch import Tensor, float64


def wide(x: Tensor) -> Tensor:
    """x in fp32; fp64 stays what it is."""
    return x if x.dtype == float64 else x.float()
