"""From a mask to what an attention kernel wants, once a forward pass and not once a layer.

    nothing       every query sees every key
    causal flag   the kernel skips the future by itself and reads no matrix
    dense bias    0 where visible, -inf where not, added to the scores (`lower`)
    block mask    FlexAttention: blocks that nobody sees are skipped, on a GPU (`lower_flex`; arXiv:2412.05496)

All say the same. `lower` takes the first of the first three that is exact at the given length; `explain` says which.

**A query that sees no key** attends to the empty set, and the empty sum is zero: its output is 0, its gradient too.
FlexAttention does so by itself. A softmax over -inf alone is NaN, so the bias of such a query lets it see key 0, which
keeps every kernel finite, and `Lowered.blind` marks it: whoever attends sets its output to 0.
"""

from dataclasses import dataclass
from functools import reduce
from operator import and_, or_

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from hanlin.nn.masks import (
    And,
    Bidirectional,
    Causal,
    Chunk,
    Dilated,
    Local,
    Mask,
    Or,
    Padding,
    Permutation,
    Prefix,
    SameDocument,
    Window,
    hides_the_future,
)


@dataclass(frozen=True, eq=False)
class Lowered:
    """What the kernel gets.

    causal: no query sees a later key. bias (rows or 1, 1, T, keys): 0 where visible, else -inf; None where the flag
    alone says everything. blind (rows or 1, 1, T or 1, 1) bool: queries that see nothing, whose output is to be 0; None
    where there are none.
    """

    causal: bool
    bias: Tensor | None
    blind: Tensor | None = None


def lower(mask: Mask, length: int, *, dtype: torch.dtype, device: torch.device, keys: int | None = None) -> Lowered:
    """The cheapest exact form of `mask` for `length` queries 0 … over as many keys, or over `keys` of them (cross).

    The bias has the dtype of the activations. The flag is given for squares only: kernels differ in what it says of
    other shapes. A bias that is the same for every query (padding) is a view of one row, not a matrix.
    """
    keys = length if keys is None else keys
    mask = fit(mask, length, keys)
    if isinstance(mask, Bidirectional):
        return Lowered(False, None)
    if isinstance(mask, Causal) and keys == length:
        return Lowered(True, None)
    visible = mask.dense(torch.arange(length, device=device), torch.arange(keys, device=device))
    bias = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
    blind = None
    if not (sees_itself(mask) and length <= keys):
        blind = ~visible.any(-1, keepdim=True)
        if device.type == "cpu" and not blind.any():  # elsewhere the question would wait for the device
            blind = None
        else:
            bias[..., :1].masked_fill_(blind, 0.0)
            blind = blind[:, None]
    return Lowered(hides_the_future(mask) and keys == length, bias.expand(-1, length, keys)[:, None], blind)


def lower_flex(
    mask: Mask, length: int, *, device: torch.device | str = "cpu", keys: int | None = None, block: int = 128
) -> BlockMask:
    """`mask` for `torch.nn.attention.flex_attention.flex_attention`: q (rows, heads, length, D), k of `keys` tokens.

    Tensors of the mask must be on `device`. block: the side of a block, tokens (the GPU kernels want 128). On a CPU
    flex_attention has a forward pass only. Making it costs a boolean matrix of rows x length x keys for a moment.
    """
    keys = length if keys is None else keys
    fitted = fit(mask, length, keys)

    def visible(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return fitted.sees(row, q, k)

    rows = fitted.rows if fitted.rows > 1 else None
    return create_block_mask(visible, rows, None, length, keys, device=device, BLOCK_SIZE=block)


def explain(mask: Mask, length: int, *, keys: int | None = None) -> str:
    """Which form `lower` chooses for `mask` at this length, and why, in a sentence."""
    keys = length if keys is None else keys
    fitted = fit(mask, length, keys)
    shape = f"{length} tokens" if keys == length else f"{length} queries and {keys} keys"
    same = "" if fitted == mask else f", because {mask} says no more than {fitted} at this length"
    if isinstance(fitted, Bidirectional):
        return f"Nothing: over {shape} every query sees every key{same}."
    if isinstance(fitted, Causal) and keys == length:
        return f"The causal flag, which costs no matrix, over {shape}{same}."
    why = f"{fitted} hides other keys than the causal flag would"
    if isinstance(fitted, Causal):
        why = "kernels differ in what the causal flag says when queries and keys are not equally many"
    elif hides_the_future(fitted) and keys == length:
        why += "; it hides all that the flag hides, so later blocks are still skipped"
    return f"A dense bias of {fitted.rows} x {length} x {keys}, because {why}."


def fit(mask: Mask, length: int, keys: int) -> Mask:
    """The simplest mask that says the same of `length` queries and `keys` keys: `Causal() & Window(50)` is `Causal()`
    up to 50 tokens. Values are looked at only in the memory of the CPU: elsewhere that would wait for the device."""
    if isinstance(mask, And):
        return reduce(and_, [fit(part, length, keys) for part in mask.parts])
    if isinstance(mask, Or):
        parts = [fit(part, length, keys) for part in mask.parts]
        if Causal() in parts:  # which shows key 0 to everyone already
            parts = [part for part in parts if not (isinstance(part, Prefix) and max(part.lengths) <= 1)]
        return reduce(or_, parts)
    return Bidirectional() if _hides_nothing(mask, length, keys) else mask


def _hides_nothing(mask: Mask, length: int, keys: int) -> bool:
    if isinstance(mask, Window):
        return mask.size >= length
    if isinstance(mask, Local | Chunk):
        return mask.size >= max(length, keys)
    if isinstance(mask, Dilated):
        return mask.step == 1
    if isinstance(mask, Prefix):
        return min(mask.lengths) >= keys
    return isinstance(mask, Padding) and mask.valid.device.type == "cpu" and bool(mask.valid[:, :keys].all())


def sees_itself(mask: Mask) -> bool:
    """Whether every query certainly sees the key of its own index, so that none is blind."""
    if isinstance(mask, And):
        return all(sees_itself(part) for part in mask.parts)
    if isinstance(mask, Or):
        return any(sees_itself(part) for part in mask.parts)
    if isinstance(mask, Permutation):
        return not mask.strict
    return isinstance(mask, Bidirectional | Causal | Window | Local | Dilated | Chunk | SameDocument)
