"""Prefix language model: the first tokens are read in both directions, the rest is written from left to right.

    ids       a b c | d e f        a prefix of 3
    targets   · · d   e f ·        position t predicts token t + 1, from the last of the prefix on

UniLM (arXiv:1905.03197), T5's "prefix LM" (arXiv:1910.10683, section 3.2). Who sees whom is `Prefix(n) | Causal()`.
"""

import numpy as np

from hanlin.core.errors import HanlinError
from hanlin.nn.losses import IGNORE


def draw_prefix(length: int, chance: np.random.Generator) -> int:
    """How many of `length` tokens are the prefix: uniform over 1 … length - 1, so that each side has a token."""
    if length < 2:
        raise HanlinError(f"A text of {length} tokens cannot be split into a prefix and a rest; expected at least 2.")
    return int(chance.integers(1, length))


def prefix_targets(ids: np.ndarray, prefix: int) -> np.ndarray:
    """ids (n,) -> (n,) int64: the next token where it lies behind the prefix, else `IGNORE`; n - prefix are trained."""
    if not 1 <= prefix <= len(ids):
        raise HanlinError(f"A prefix of {prefix} in a text of {len(ids)} tokens; expected 1 to {len(ids)}.")
    targets = np.full(len(ids), IGNORE, dtype=np.int64)
    targets[prefix - 1 : -1] = ids[prefix:]
    return targets
