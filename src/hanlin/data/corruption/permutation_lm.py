"""Permutation language model: tokens are predicted one after the other, but in a random order of places.

    order z, rank of each token   0 0 2 0 1 0        two are predicted: place 4 first, then place 2
    content stream                sees ranks <= its own      `Permutation(order)`
    query stream                  sees ranks <  its own      `Permutation(order, strict=True)`

    max over theta of  E_z [ sum over t > c of  log p(x_z_t | x_z_<t) ]      XLNet, arXiv:1906.08237, eq. 3 and 5

Only the last 1/K in the order are predicted. The others are context: they share rank 0, so that they see each other in
both directions (as in the published model), or stand in a random order of their own before the predicted (eq. 4 to the
letter).
"""

import math

import numpy as np

from hanlin.core.errors import HanlinError


def choose_last(allowed: np.ndarray, chance: np.random.Generator, *, one_in: float = 6.0) -> np.ndarray:
    """The last 1/K of a uniform order: allowed (n,) bool (no markers, no padding) -> (n,) bool, K = `one_in`.

    floor(allowed / K) tokens, at least one where any is allowed.
    """
    places = np.flatnonzero(allowed)
    chosen = np.zeros(len(allowed), dtype=bool)
    chosen[chance.permutation(places)[: count_predicted(len(places), one_in)]] = True
    return chosen


def choose_spans(
    allowed: np.ndarray, chance: np.random.Generator, *, one_in: float = 6.0, longest: int = 5
) -> np.ndarray:
    """Span-based prediction (XLNet, section 3.1): spans of L ~ uniform 1 … `longest` tokens, each anywhere within its
    stretch of K L tokens; the next stretch begins where this one ends. Tokens that are not allowed stay context.

    allowed (n,) bool -> (n,) bool: at most n / K + longest tokens, at least one where any is allowed; of two tokens or
    more one stays context.
    """
    if longest < 1 or one_in <= 1:
        raise HanlinError(f"Spans of at most {longest} tokens, one in {one_in} predicted: expected at least 1, over 1.")
    chosen = np.zeros(len(allowed), dtype=bool)
    at = 0
    while at < len(allowed):
        length = int(chance.integers(1, longest + 1))
        stretch = math.ceil(length * one_in)
        start = at + int(chance.integers(0, stretch - length + 1))
        chosen[start : start + length] = True
        at += stretch
    chosen &= allowed
    if chosen.all() and len(chosen) > 1:
        chosen[chance.integers(0, len(chosen))] = False
    if allowed.any() and not chosen.any():
        chosen[chance.choice(np.flatnonzero(allowed))] = True
    return chosen


def count_predicted(allowed: int, one_in: float) -> int:
    """How many of `allowed` tokens `choose_last` takes."""
    if one_in <= 1:
        raise HanlinError(f"One in {one_in} tokens is predicted; expected more than 1, so that there is context.")
    return max(1, int(allowed // one_in)) if allowed else 0


def draw_order(predicted: np.ndarray, chance: np.random.Generator, *, context_ordered: bool = False) -> np.ndarray:
    """The rank of each token in the factorisation order: predicted (n,) bool -> (n,) int64.

    Predicted tokens have different ranks in random order, all above the context's, which is 0 for every context token,
    or a random order too (context_ordered).
    """
    order = np.zeros(len(predicted), dtype=np.int64)
    context = len(predicted) - int(predicted.sum())
    first = 1
    if context_ordered:
        order[~predicted] = chance.permutation(context)
        first = context
    order[predicted] = first + chance.permutation(len(predicted) - context)
    return order
