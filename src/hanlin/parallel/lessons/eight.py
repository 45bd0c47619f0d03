"""The eight collectives out of messages from one rank to another, and what each costs. n ranks; S bytes of data.

                 picture (n = 3; letters: data, + sums)          a rank sends at most    steps that follow each other
    broadcast    a . .         -> a a a                          S ceil(log2 n)          ceil(log2 n)
    reduce       a b c         -> a+b+c . .                      S                       ceil(log2 n)
    scatter      abc . .       -> a b c                          S (n-1)/n               n-1
    gather       a b c         -> abc . .                        S/n                     n-1
    all_gather   a b c         -> abc abc abc                    S (n-1)/n               n-1
    red._scatter abc def ghi   -> a+d+g b+e+h c+f+i              S (n-1)/n               n-1
    all_reduce   a b c         -> a+b+c a+b+c a+b+c              S ceil(log2 n)          2 ceil(log2 n)
    all_to_all   abc def ghi   -> adg beh cfi                    S (n-1)/n               n-1

S is the whole tensor: of a gather what arrives, of a scatter what leaves. Broadcast and reduce double their reach with
each step (a binomial tree); all_gather and reduce_scatter hand parts around a ring; all_reduce is here a reduce and a
broadcast: few steps, but the root sends all of S each time. `ring_all_reduce` sends less in more steps.
(Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", 2005.)

Every function is called by all ranks of the group with tensors of equal shape and dtype. Sums are taken in that dtype.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None  # None: all processes


def broadcast(x: Tensor, source: int = 0, group: Group = None) -> Tensor:
    """x of the rank `source`, written into x of all others. Step d: the first d ranks tell the next d."""
    n, me = _from(source, group)
    for reach in _doublings(n):
        if me < reach and me + reach < n:
            dist.send(x, group=group, group_dst=(me + reach + source) % n)
        elif reach <= me < 2 * reach:
            dist.recv(x, group=group, group_src=(me - reach + source) % n)
    return x


def reduce(x: Tensor, target: int = 0, group: Group = None) -> Tensor:
    """The sum of the ranks' x on the rank `target`; elsewhere a part of it. The tree of `broadcast`, backwards."""
    n, me = _from(target, group)
    x = x.clone()
    for reach in reversed(_doublings(n)):
        if reach <= me < 2 * reach:
            dist.send(x, group=group, group_dst=(me - reach + target) % n)
        elif me < reach and me + reach < n:
            other = torch.empty_like(x)
            dist.recv(other, group=group, group_src=(me + reach + target) % n)
            x += other
    return x


def scatter(part: Tensor, parts: Tensor | None, source: int = 0, group: Group = None) -> Tensor:
    """parts (n, *shape) of the rank `source`, None elsewhere: part r is written into `part` (*shape) of rank r."""
    n, me = dist.get_world_size(group), dist.get_rank(group)
    if parts is None:
        dist.recv(part, group=group, group_src=source)
        return part
    for r in range(n):
        if r != me:
            dist.send(parts[r], group=group, group_dst=r)
    return part.copy_(parts[me])


def gather(x: Tensor, target: int = 0, group: Group = None) -> Tensor | None:
    """The ranks' x (*shape) -> (n, *shape) on the rank `target`, None elsewhere."""
    n, me = dist.get_world_size(group), dist.get_rank(group)
    if me != target:
        dist.send(x, group=group, group_dst=target)
        return None
    found = x.new_empty(n, *x.shape)
    found[me] = x
    for r in range(n):
        if r != me:
            dist.recv(found[r], group=group, group_src=r)
    return found


def all_gather(x: Tensor, group: Group = None) -> Tensor:
    """The ranks' x (*shape) -> (n, *shape) on all. Each step hands on to the right what came from the left."""
    n, me = dist.get_world_size(group), dist.get_rank(group)
    found = x.new_empty(n, *x.shape)
    found[me] = x
    for step in range(n - 1):
        exchange(found[(me - step) % n], me + 1, found[(me - step - 1) % n], me - 1, group)
    return found


def reduce_scatter(x: Tensor, group: Group = None) -> Tensor:
    """x (n, *shape): rank r gets part r of the ranks' sum, (*shape). Sums grow while they travel around the ring."""
    n, me = dist.get_world_size(group), dist.get_rank(group)
    moving, arriving = x[(me - 1) % n].clone(), torch.empty_like(x[0])
    for step in range(n - 1):
        exchange(moving, me + 1, arriving, me - 1, group)
        torch.add(arriving, x[(me - step - 2) % n], out=moving)
    return moving


def all_reduce(x: Tensor, group: Group = None) -> Tensor:
    """The sum of the ranks' x, on all of them: the same bits."""
    return broadcast(reduce(x, 0, group), 0, group)


def all_to_all(x: Tensor, group: Group = None) -> Tensor:
    """x (n, *shape): part r goes to rank r; found[r] came from rank r. Step s: to the s-th rank on the right."""
    n, me = dist.get_world_size(group), dist.get_rank(group)
    found = torch.empty_like(x)
    found[me] = x[me]
    for step in range(1, n):
        exchange(x[(me + step) % n], me + step, found[(me - step) % n], me - step, group)
    return found


def exchange(give: Tensor, to: int, take: Tensor, source: int, group: Group) -> None:
    """Send and receive at once: if all ranks sent first and then received, a ring could wait for itself forever.
    to, source: ranks of the group, counted around it. give and take: contiguous, and no memory in common."""
    n = dist.get_world_size(group)
    both = [
        dist.P2POp(dist.isend, give, group=group, group_peer=to % n),
        dist.P2POp(dist.irecv, take, group=group, group_peer=source % n),
    ]
    for work in dist.batch_isend_irecv(both):  # one batch: NCCL pairs what it is told together
        work.wait()


@dataclass(frozen=True)
class Cost:
    """sent: bytes that the rank sends; steps: messages of the collective that have to follow each other."""

    sent: int
    steps: int


def cost(name: str, size: int, n: int, rank: int, root: int = 0) -> Cost:
    """What a collective of n ranks costs this rank. size: bytes of the whole tensor (S above), which n divides where it
    is made of n parts; root: source or target."""
    me, depth = (rank - root) % n, (n - 1).bit_length()
    children = sum(me < reach and me + reach < n for reach in _doublings(n))  # in the tree
    up, around = size * (me > 0), size // n * (n - 1)
    return {
        "broadcast": Cost(size * children, depth),
        "reduce": Cost(up, depth),
        "scatter": Cost(around * (me == 0), n - 1),
        "gather": Cost(size // n * (me > 0), n - 1),
        "all_gather": Cost(around, n - 1),
        "reduce_scatter": Cost(around, n - 1),
        "all_reduce": Cost(up + size * children, 2 * depth),
        "all_to_all": Cost(around, n - 1),
    }[name]


def _from(root: int, group: Group) -> tuple[int, int]:
    """(n, this rank), counted from the root."""
    n = dist.get_world_size(group)
    return n, (dist.get_rank(group) - root) % n


def _doublings(n: int) -> list[int]:
    """1, 2, 4, ... below n."""
    return [1 << step for step in range((n - 1).bit_length())]
