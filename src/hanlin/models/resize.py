"""More or fewer tokens: the rows of the embedding, of the head and of its bias, together.

A new row may begin as the mean of the pieces that the old tokenizer made of the new token (WECHSEL-style overlap of its
own text, arXiv:2112.06598; for Chinese vocabularies arXiv:2304.08177), as the mean of all rows (Hewitt 2021,
"Initializing new word embeddings for pretrained language models"), or as a copy of a given row.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.models.transformer import Transformer


@torch.no_grad()
def resize_token_embeddings(
    model: Transformer, size: int, *, pieces: Sequence[Sequence[int]] | None = None, copy: Sequence[int] | None = None
) -> None:
    """Give `model`, in place, a vocabulary of `size` tokens.

    pieces: for each new token the old ids whose rows it begins as the mean of; copy: for each new token the old id
    whose row it copies; neither: the mean of all old rows, in fp32. Fewer tokens cut the last rows off. A tied head
    stays tied. The parameters are new ones: make an optimiser afterwards.
    """
    old = model.config.vocab_size
    if size < 1:
        raise HanlinError(f"A vocabulary has at least one token; {size} were asked for.")
    sources = _sources(old, size, pieces, copy)
    embedding, head = model.model.embed_tokens, model.lm_head
    embedding.weight = _grown(embedding.weight, size, sources)
    embedding.num_embeddings = size
    if head is not None:
        tied = model.config.tied_embeddings
        head.weight = embedding.weight if tied else _grown(head.weight, size, sources)
        if head.bias is not None:
            head.bias = _grown(head.bias, size, sources)
        head.out_features = size
    model.config = replace(model.config, vocab_size=size)


def _sources(
    old: int, size: int, pieces: Sequence[Sequence[int]] | None, copy: Sequence[int] | None
) -> list[Sequence[int]] | None:
    """For each new token the old rows it is the mean of; None: all of them."""
    if pieces is not None and copy is not None:
        raise HanlinError("Give `pieces` or `copy`, not both: a new row begins in one way.")
    given: list[Sequence[int]] | None = None
    if pieces is not None:
        given = list(pieces)
    elif copy is not None:
        given = [[index] for index in copy]
    if given is None:
        return None
    if len(given) != max(0, size - old):
        raise HanlinError(f"{max(0, size - old)} tokens are new ({old} -> {size}), but {len(given)} are described.")
    for number, ids in enumerate(given):
        if not ids or not all(0 <= index < old for index in ids):
            raise HanlinError(f"New token {number} is made of {list(ids)}; it needs old ids, 0 … {old - 1}.")
    return given


def _grown(parameter: Tensor, size: int, sources: list[Sequence[int]] | None) -> nn.Parameter:
    """A parameter (vocabulary, ...) of `size` rows."""
    old = parameter.data
    rows = old[:size]
    if size > len(old):
        wide = old.double() if old.dtype == torch.float64 else old.float()
        if sources is None:
            new = wide.mean(0, keepdim=True).expand(size - len(old), *old.shape[1:])
        else:
            new = torch.stack([wide[torch.tensor(list(ids), device=old.device)].mean(0) for ids in sources])
        rows = torch.cat([rows, new.to(old.dtype)])
    return nn.Parameter(rows.clone(), requires_grad=parameter.requires_grad)
