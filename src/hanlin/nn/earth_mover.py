"""Earth-mover distance between what a model predicts and the token that came (EMO, arXiv:2310.04691).

    C(i, j) = 1 - cos(e_i, e_j)        loss = sum over tokens of sum_i Q(i) C(i, y) = 1 - (Q E^) . e^_y

Moving probability from token i to token y costs as much as the two differ in meaning, so a near miss costs less than a
blunder, and what the model gives to *all* wrong tokens takes part (cross-entropy sees Q(y) alone). For a target that is
one token the only transport plan moves everything to it, so this upper bound of the distance is the distance. The paper
trains it together with cross-entropy (`nn.multitask`), with the embeddings of the pretrained model as E.
"""

import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.chunked_head import Head, through_head, wide_dtype
from hanlin.nn.losses import IGNORE


def earth_mover(logits: Tensor, targets: Tensor, embeddings: Tensor) -> Tensor:
    """logits (..., vocabulary), targets (...) with `IGNORE` where there is no loss, embeddings (vocabulary, any) that
    say what differs from what (no gradient goes there) -> fp32 scalar (fp64 for fp64 logits)."""
    _check(logits.shape[-1], targets.shape, logits.shape[:-1], embeddings)
    keep = targets != IGNORE
    return _transport(logits[keep], targets[keep], _unit(embeddings, logits))


def linear_earth_mover(
    hidden: Tensor, head: Head, targets: Tensor, embeddings: Tensor, *, chunk: int | None = None
) -> Tensor:
    """`earth_mover` of the logits of hidden (..., width), a chunk of tokens at a time."""
    _check(len(head.weight), targets.shape, hidden.shape[:-1], embeddings)
    unit = _unit(embeddings, hidden)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return _transport(logits, target, unit)

    return through_head(hidden, head, loss, targets, keep=targets != IGNORE, chunk=chunk)


def _transport(logits: Tensor, targets: Tensor, unit: Tensor) -> Tensor:
    expected = logits.to(unit.dtype).softmax(-1) @ unit  # (n, any): the mean direction of what is predicted
    return len(targets) - (expected * unit[targets]).sum()


def _unit(embeddings: Tensor, like: Tensor) -> Tensor:
    return F.normalize(embeddings.detach().to(wide_dtype(like)), dim=-1)


def _check(vocabulary: int, targets: tuple[int, ...], tokens: tuple[int, ...], embeddings: Tensor) -> None:
    if targets != tokens:
        raise HanlinError(f"Targets {list(targets)} do not fit predictions of {list(tokens)} tokens.")
    if embeddings.ndim != 2 or len(embeddings) != vocabulary:
        raise HanlinError(
            f"The embeddings {list(embeddings.shape)} must have one row for each of the {vocabulary} tokens."
        )
