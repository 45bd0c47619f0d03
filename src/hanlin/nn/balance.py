"""Keeping experts equally busy: the losses that balance a router, and the figures that show whether it is balanced.

    load balance   L = E * sum over experts e of f_e P_e      f_e: choices of e a token, P_e: mean probability of e
    router z       L = sum over tokens of log(sum exp z)^2    keeps logits small, where fp32's softmax is exact

Load balance: Switch (arXiv:2101.03961, eq. 4-6), GShard (arXiv:2006.16668), here with k choices a token. An even load
gives k. f counts and has no slope; P carries it. Router z: ST-MoE (arXiv:2202.08906, eq. 5). Balancing without a loss:
`nn.routing.update_correction`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.routing import Routing
from hanlin.nn.wide import wide


def load_balance_loss(notes: Sequence[Routing], mask: Tensor | None = None) -> Tensor:
    """The loss over the tokens of all given layers together; the papers' loss of each layer: give one at a time.

    notes: routings of layers with equally many experts; mask (tokens,), or any shape with as many elements: True where
    a token counts (not padding) -> scalar, fp32 or fp64. What was chosen counts, also where capacity dropped it (as in
    Switch, eq. 5). Sigmoid scores are divided by their sum first (DeepSeek-V3, arXiv:2412.19437, eq. 18-19).
    """
    if not notes:
        raise HanlinError("There is nothing to balance: no layer reported its routing.")
    experts = notes[0].scores.shape[-1]
    chosen, probability = (notes[0].scores.new_zeros(experts) for _ in range(2))
    tokens = notes[0].scores.new_zeros(())
    for note in notes:
        keep = _flat_mask(mask, note)
        shares = note.scores / note.scores.sum(-1, keepdim=True)  # (tokens, experts)
        if keep is not None:
            shares = shares * keep[:, None]
        chosen = chosen + expert_load(note, mask)
        probability = probability + shares.sum(0)
        tokens = tokens + (len(note.experts) if keep is None else keep.sum())
    return experts * (chosen / tokens * (probability / tokens)).sum()


def router_z_loss(notes: Sequence[Routing], mask: Tensor | None = None) -> Tensor:
    """Sum over layers and tokens of log(sum exp logits)^2, fp32 or fp64; its denominator is tokens * layers.

    mask: as in `load_balance_loss`.
    """
    if not notes:
        raise HanlinError("There is no router: no layer reported its routing.")
    total = torch.zeros((), device=notes[0].logits.device)
    for note in notes:
        squares = wide(note.logits).logsumexp(-1).square()  # (tokens,)
        keep = _flat_mask(mask, note)
        total = total + (squares if keep is None else squares * keep).sum()
    return total


@torch.no_grad()
def expert_load(note: Routing, mask: Tensor | None = None, *, kept_only: bool = False) -> Tensor:
    """How many choices fell on each expert: (experts,) in the dtype of the scores.

    kept_only: without those that capacity dropped. Loads of steps and ranks add up.
    """
    counts = torch.ones_like(note.experts, dtype=note.scores.dtype)  # (tokens, k)
    keep = _flat_mask(mask, note)
    if keep is not None:
        counts = counts * keep[:, None]
    if kept_only and note.kept is not None:
        counts = counts * note.kept
    empty = counts.new_zeros(note.scores.shape[-1])
    return empty.index_add_(0, note.experts.flatten(), counts.flatten())


def max_violation(load: Tensor) -> Tensor:
    """How far the busiest expert lies above the mean (MaxVio of arXiv:2408.15664): max / mean - 1; 0 is even.

    load (..., experts) -> (...).
    """
    load = wide(load)
    return load.amax(-1) / load.mean(-1) - 1


def _flat_mask(mask: Tensor | None, note: Routing) -> Tensor | None:
    if mask is None:
        return None
    if mask.numel() != len(note.experts):
        raise HanlinError(f"A mask of {list(mask.shape)} does not fit a routing of {len(note.experts)} tokens.")
    return mask.reshape(-1).to(note.scores.dtype)
