"""Small heads over hidden states (rows, T, width): what a model is used for besides writing. Saved beside the model.

    classify a text      Linear(pool(hidden))           the last token of a decoder, the first of an encoder
    classify tokens      Linear(hidden)
    sentence vector      pool(hidden), length 1         arXiv:1908.10084
    sentence pairs       Linear(tanh(dense(first)))     BERT's pooler and next-sentence head, arXiv:1810.04805
    value                Linear(hidden) -> one number a token             arXiv:2203.02155
    score a text         sum of log p(token | tokens before)

`valid` (rows, T) bool is True where there is a token; padding may stand on either side. None: everywhere.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.nn.dropout import Dropout
from hanlin.nn.linear import Linear
from hanlin.nn.wide import wide

Pooling = Literal["cls", "mean", "max", "last"]


def pool(hidden: Tensor, valid: Tensor | None = None, *, kind: Pooling = "mean", normalise: bool = False) -> Tensor:
    """One vector a row, (rows, width), from its real tokens: the first (cls), the last, the mean or the maximum of each
    number. normalise: to length 1. The mean is summed in fp32 (fp64 for fp64)."""
    rows, length, _ = hidden.shape
    if valid is None:
        valid = torch.ones(rows, length, dtype=torch.bool, device=hidden.device)
    _check_valid(valid, rows, length)
    if kind == "cls":
        out = hidden[torch.arange(rows, device=hidden.device), valid.int().argmax(1)]
    elif kind == "last":
        out = hidden[torch.arange(rows, device=hidden.device), last_index(valid)]
    elif kind == "mean":
        real = wide(hidden).masked_fill(~valid[..., None], 0)  # not a product: what stands at padding may be NaN
        out = (real.sum(1) / valid.sum(1, keepdim=True)).to(hidden.dtype)
    elif kind == "max":
        out = hidden.masked_fill(~valid[..., None], float("-inf")).amax(1)
    else:
        raise HanlinError(f"There is no pooling {kind!r}. Known are: cls, mean, max, last.")
    return F.normalize(wide(out), dim=-1).to(out.dtype) if normalise else out


def last_index(valid: Tensor) -> Tensor:
    """Where the last real token of each row stands: valid (rows, T) -> (rows,)."""
    return valid.shape[1] - 1 - valid.flip(1).int().argmax(1)


class Pooler(nn.Module):
    """BERT's sentence vector: tanh(dense(first token))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, width)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """hidden (rows, T, width) -> (rows, width)."""
        return torch.tanh(self.dense(pool(hidden, valid, kind="cls")))


class NextSentence(nn.Module):
    """BERT's second task: does sentence B follow A? Logits (rows, 2): 0 it follows, 1 it was drawn at random."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pooler = Pooler(width)
        self.classifier = Linear(width, 2)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.classifier(self.pooler(hidden, valid))


class SequenceClassifier(nn.Module):
    """A label for a text. pooling "last" suits a decoder, where only the last token has read all; "cls" an encoder.
    pooler: BERT's tanh layer in between, which wants "cls". One label: a reward or a regression."""

    def __init__(
        self,
        width: int,
        labels: int,
        *,
        pooling: Pooling = "last",
        pooler: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pooler and pooling != "cls":
            raise HanlinError(f"BERT's pooler reads the first token: pooling 'cls'; found {pooling!r}.")
        self.pooling = pooling
        self.pooler = Pooler(width) if pooler else None
        self.dropout = Dropout(dropout) if dropout else None
        self.classifier = Linear(width, labels, bias=bias)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """hidden (rows, T, width) -> logits (rows, labels)."""
        x = pool(hidden, valid, kind=self.pooling) if self.pooler is None else self.pooler(hidden, valid)
        return self.classifier(x if self.dropout is None else self.dropout(x))


class TokenClassifier(nn.Module):
    """A label for each token (named entities, parts of speech)."""

    def __init__(self, width: int, labels: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = Dropout(dropout) if dropout else None
        self.classifier = Linear(width, labels, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (rows, T, width) -> logits (rows, T, labels)."""
        return self.classifier(hidden if self.dropout is None else self.dropout(hidden))


class ValueHead(nn.Module):
    """What reward is still to come after each token: (rows, T, width) -> (rows, T), fp32 (fp64 for fp64), because it is
    subtracted from returns. The weight starts at 0: before it has learnt, it expects nothing."""

    def __init__(self, width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = Dropout(dropout) if dropout else None
        self.value = Linear(width, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden if self.dropout is None else self.dropout(hidden)
        return self.value(wide(x)).squeeze(-1)


def sequence_scores(logits: Tensor, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each row's text and of how many tokens it is the sum: (rows,) fp32 or fp64, (rows,) int64.

    logits (rows, T, vocabulary), those at t predict ids (rows, T) at t + 1; counts (rows, T) bool: which tokens belong
    to the text that is scored (an answer behind its question, real ones before padding). The first token of a row is
    predicted by nothing and never counts.
    """
    if logits.shape[:2] != ids.shape:
        raise HanlinError(f"Logits {tuple(logits.shape)} do not belong to ids {tuple(ids.shape)}: (rows, T) differ.")
    _check_shape(counts, *ids.shape)
    high = wide(logits[:, :-1])
    logprobs = high.gather(-1, ids[:, 1:, None]).squeeze(-1) - high.logsumexp(-1)  # (rows, T - 1)
    counted = counts[:, 1:]
    return logprobs.masked_fill(~counted, 0).sum(1), counted.sum(1)


def _check_valid(valid: Tensor, rows: int, length: int) -> None:
    _check_shape(valid, rows, length)
    if not bool(valid.any(1).all()):
        raise HanlinError(f"Row {int((~valid.any(1)).int().argmax())} has no real token that could be pooled.")


def _check_shape(valid: Tensor, rows: int, length: int) -> None:
    if valid.shape != (rows, length) or valid.dtype != torch.bool:
        raise HanlinError(
            f"Which tokens are real is bool ({rows}, {length}); found {valid.dtype} {tuple(valid.shape)}."
        )
