"""The all-reduce around a ring: every rank sends 2 (n-1)/n of the data, however many ranks there are.

    n = 3      rank 0        rank 1        rank 2         x is cut into n parts; each rank talks to its right only
    begin      a0 b0 c0      a1 b1 c1      a2 b2 c2
    step 1     .. .. c02     a01 .. ..     .. b12 ..      reduce-scatter: sums grow while they travel
    step 2     .. b012 ..    .. .. c012    a012 .. ..     each rank owns one finished part
    step 3, 4  a b c         a b c         a b c          all-gather: the finished parts travel on

In each half n-1 of the n parts leave a rank: (n-1)/n of the data twice, which no all-reduce can undercut (Patarasu and
Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). It pays with 2 (n-1) steps where a
tree has 2 log2 n: rings are for large tensors, trees for small ones. A part is summed in one order by one rank at a
time, so all ranks end with the same bits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from hanlin.parallel.lessons.eight import Group, exchange


def ring_all_reduce(x: Tensor, group: Group = None) -> Tensor:
    """The sum of the ranks' x, written into x (contiguous, any shape, equal on all ranks), which is returned.

    Parts may differ by one number where n does not divide x. All ranks of the group call it.
    """
    n, me = dist.get_world_size(group), dist.get_rank(group)
    parts = x.view(-1).tensor_split(n)
    for step in range(n - 1):  # reduce-scatter
        going, growing = parts[(me - step) % n], parts[(me - step - 1) % n]
        arrived = torch.empty_like(growing)
        exchange(going, me + 1, arrived, me - 1, group)
        growing += arrived
    for step in range(n - 1):  # all-gather
        exchange(parts[(me - step + 1) % n], me + 1, parts[(me - step) % n], me - 1, group)
    return x


def bytes_sent(numbers: int, itemsize: int, n: int, rank: int) -> int:
    """Bytes that a rank sends to sum `numbers` numbers over n ranks: 2 (n-1)/n of them where n divides them."""
    sizes = [numbers // n + (part < numbers % n) for part in range(n)]
    return itemsize * (2 * numbers - sizes[(rank + 1) % n] - sizes[(rank + 2) % n])


def steps(n: int) -> int:
    """Messages that follow each other."""
    return 2 * (n - 1)
