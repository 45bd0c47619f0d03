"""Masked language model: 15 % of the tokens are to be guessed from the others (BERT, arXiv:1810.04805, section 3.1).

    of the chosen tokens   80 % become [MASK]   10 % a random token   10 % stay as they are

What stays or is replaced keeps the model from trusting every token that is not [MASK], which it never meets later.
Whole words (BERT's later release): all pieces of a word are chosen together, the three fates still fall token by token.
"""

import numpy as np

from hanlin.core.errors import HanlinError
from hanlin.nn.losses import IGNORE


def choose_tokens(
    maskable: np.ndarray, chance: np.random.Generator, *, rate: float = 0.15, words: np.ndarray | None = None
) -> np.ndarray:
    """Which tokens are to be guessed: maskable (n,) bool -> (n,) bool.

    Exactly round(rate * maskable tokens) of them, at least one where any may be masked. words (n,): the number of each
    token's word (`boundaries.WordTable`): then words are drawn until the next would exceed that count (a longer one is
    passed over), and a word with a token that may not be masked is left alone.
    """
    if not 0 < rate <= 1:
        raise HanlinError(f"A masking rate of {rate}; expected more than 0 and at most 1.")
    places = np.flatnonzero(maskable)
    chosen = np.zeros(len(maskable), dtype=bool)
    wanted = max(1, round(rate * len(places))) if len(places) else 0
    if words is None:
        chosen[chance.permutation(places)[:wanted]] = True
        return chosen
    if len(words) != len(maskable):
        raise HanlinError(f"{len(words)} word numbers for {len(maskable)} tokens; expected one each.")
    whole = np.setdiff1d(words[places], words[~maskable])
    first: np.ndarray | None = None
    for word in chance.permutation(whole):
        pieces = np.flatnonzero(words == word)
        first = pieces if first is None else first
        if len(pieces) <= wanted:
            chosen[pieces] = True
            wanted -= len(pieces)
        if not wanted:
            break
    if first is not None and not chosen.any():  # every word is longer than what is wanted: one is better than none
        chosen[first] = True
    return chosen


def mask_tokens(
    ids: np.ndarray,
    chosen: np.ndarray,
    chance: np.random.Generator,
    *,
    mask_id: int,
    replacements: np.ndarray,
    masked: float = 0.8,
    replaced: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """(ids as the model sees them, targets), both (n,) int64: each chosen token meets its fate independently.

    masked, replaced: shares of the chosen tokens that become `mask_id`, or one of `replacements` (drawn uniformly; it
    may be the token itself). Targets are the tokens as they were, `IGNORE` where nothing was chosen.
    """
    if masked < 0 or replaced < 0 or masked + replaced > 1:
        raise HanlinError(f"Shares {masked} masked, {replaced} replaced; expected none negative, at most 1 together.")
    if replaced and not len(replacements):
        raise HanlinError("Some tokens are to be replaced by random ones, but `replacements` names none.")
    fate = chance.random(len(ids))
    spoiled = ids.astype(np.int64)
    spoiled[chosen & (fate < masked)] = mask_id
    random = chosen & (fate >= masked) & (fate < masked + replaced)
    spoiled[random] = replacements[chance.integers(0, max(1, len(replacements)), int(random.sum()))]
    return spoiled, np.where(chosen, ids, IGNORE).astype(np.int64)
