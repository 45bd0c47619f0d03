"""Held-out loss, perplexity and bits per byte.

    loss          = nats / predicted tokens                       depends on the tokenizer
    perplexity    = exp(loss)                                     depends on the tokenizer
    bits per byte = nats / ln 2 / bytes of the predicted tokens   comparable with any model or compressor

The convention, so that numerator and denominator agree: a document's first token has nothing before it and is not
predicted, so neither its nats nor its bytes count (unless the tokenizer puts a beginning token before it). A special
token, such as the end of a document, is predicted and its nats count, though it stands for no byte of text: a model
pays for saying where a text ends. No token is predicted twice.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.progress import Progress
from hanlin.core.text_sources import read_documents
from hanlin.data.batch import Batch, BatchSource
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import IGNORE
from hanlin.tokens import Tokenizer
from hanlin.train.objective import batch_loss

TOKENS_AT_ONCE = 8192  # of one forward pass: enough to fill a matrix unit, little enough for a small machine

SORTED_TOGETHER = 1024  # windows
LONG = 2048  # tokens of context past which more costs much and tells little, unless asked for

Window = tuple[list[int], int]  # tokens with the one after them, and how many of the last are to be predicted


@dataclass(frozen=True)
class HeldOut:
    """nats: the sum over `tokens` predicted tokens. bytes: of text that those tokens stand for; None where no tokenizer
    was given that could say."""

    nats: float
    tokens: int
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def row(self) -> dict[str, float | int | None]:
        """Everything as one flat JSON object."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def evaluate_text(
    model: Transformer,
    source: BatchSource,
    *,
    tokenizer: Tokenizer | None = None,
    max_rows: int | None = None,
    quiet: bool = True,
) -> HeldOut:
    """Loss over the source's rows, each token once and each document apart.

    tokenizer: the one that made the rows; gives the bytes. max_rows: the first so many rows of the source's order
    (None: one epoch). A source without a predicted token, or an endless one without `max_rows`, is a `HanlinError`.
    """
    return _measure(model, rows_once(source, max_rows), tokenizer, title="evaluate", quiet=quiet)


def evaluate_strings(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    quiet: bool = True,
) -> HeldOut:
    """Loss over whole texts, each a document that ends with the tokenizer's end token, however long.

    A window of `context` tokens (None: the model's `max_positions`, at most 2,048) moves on by `stride` tokens (None:
    half of it), and predicts only what no window before it has predicted, so each token is predicted once, with at
    least `context - stride` tokens before it as soon as the text has them.
    """
    most = model.config.max_positions
    length = min(most, LONG) if context is None else context
    if not 1 <= length <= most:
        raise HanlinError(
            f"The context is {length} tokens; it must be between 1 and the {most} that the model can see."
        )
    step = max(1, length // 2) if stride is None else stride
    if not 1 <= step <= length:
        raise HanlinError(f"The stride is {step}; it must be between 1 and the context of {length} tokens.")
    windows = (
        window
        for text in texts
        if text
        for window in _windows([*tokenizer.prompt(text), tokenizer.eos_id], length, step)
    )
    return _measure(model, _batches(windows), tokenizer, title="evaluate", quiet=quiet)


def evaluate_files(
    model: Transformer,
    tokenizer: Tokenizer,
    files: Sequence[str | os.PathLike[str]],
    *,
    context: int | None = None,
    stride: int | None = None,
    quiet: bool = True,
) -> HeldOut:
    """`evaluate_strings` over every document of files (txt, jsonl, json, parquet, packed or not) and folders."""
    texts = (document.text for document in read_documents(files))
    return evaluate_strings(model, tokenizer, texts, context=context, stride=stride, quiet=quiet)


@torch.no_grad()
def _measure(
    model: Transformer, batches: Iterable[Batch], tokenizer: Tokenizer | None, *, title: str, quiet: bool
) -> HeldOut:
    nats, tokens, size = 0.0, 0, 0
    lengths: dict[int, int] = {}
    training = model.training
    model.eval()
    try:
        with Progress(title, unit="tokens", quiet=quiet) as bar:
            for batch in batches:
                here = batch.to(model.device)
                nats += float(batch_loss(model, here))
                predicted = batch.targets[batch.targets != IGNORE]
                tokens += len(predicted)
                if tokenizer is not None:
                    size += count_bytes(predicted, tokenizer, lengths)
                bar.advance(len(predicted), loss=nats / max(1, tokens))
    finally:
        model.train(training)
    if not tokens:
        raise HanlinError(
            "The text to evaluate has no token that can be predicted: it is empty, or every document is one token long."
        )
    return HeldOut(nats, tokens, None if tokenizer is None else size)


def count_bytes(ids: Tensor, tokenizer: Tokenizer, lengths: dict[int, int]) -> int:
    """Bytes of text that tokens (n,) stand for; special tokens stand for none. lengths: filled as they are found."""
    values, counts = ids.unique(return_counts=True)
    special, total = set(tokenizer.special.values()), 0
    for token, count in zip(values.tolist(), counts.tolist(), strict=True):
        if token not in lengths:
            lengths[token] = 0 if token in special else len(tokenizer.token_bytes(token))
        total += lengths[token] * count
    return total


def rows_once(source: BatchSource, max_rows: int | None) -> Iterator[Batch]:
    """Rows of one epoch, a few at a time. A source that knows its `rows_per_epoch` gives each once; of another, such as
    a mixture, one epoch is its whole steps."""
    rows = getattr(source, "rows_per_epoch", None) or source.steps_per_epoch * source.rows_per_step
    if max_rows is not None:
        rows = min(rows or max_rows, max_rows)
    if not rows:
        raise HanlinError("This source has no end: say how many of its rows to evaluate (max_rows).")
    for first in range(0, rows, source.rows_per_step):
        step = source.batch(first // source.rows_per_step, 0, min(source.rows_per_step, rows - first))
        some = max(1, TOKENS_AT_ONCE // step.ids.shape[1])
        for start in range(0, len(step), some):
            yield step.rows(start, start + some)


def _windows(ids: list[int], length: int, stride: int) -> Iterator[Window]:
    done = 1  # tokens predicted so far; the first is given
    while done < len(ids):
        new = min(stride if done > 1 else length, len(ids) - done)
        end = done + new
        yield ids[max(0, end - length - 1) : end], new
        done = end


def _batches(windows: Iterator[Window]) -> Iterator[Batch]:
    """Windows as rows, padded on the right, as many as fit `TOKENS_AT_ONCE`; equal lengths side by side, or short
    documents would mostly be padding."""
    while some := sorted(islice(windows, SORTED_TOGETHER), key=lambda window: -len(window[0])):
        start = 0
        while start < len(some):
            width = len(some[start][0]) - 1  # the widest of the rows to come
            stop = start + max(1, TOKENS_AT_ONCE // width)
            yield _stack(some[start:stop], width)
            start = stop


def _stack(rows: list[Window], width: int) -> Batch:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    documents = torch.full_like(ids, -1)
    for row, (tokens, new) in enumerate(rows):
        size = len(tokens) - 1
        ids[row, :size] = torch.tensor(tokens[:-1])
        targets[row, size - new : size] = torch.tensor(tokens[-new:])
        documents[row, :size] = 0
    return Batch(ids, targets, torch.arange(width).expand_as(ids), documents)
