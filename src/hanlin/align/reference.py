"""What the policy is compared with: its log-probabilities under a reference, computed when a batch is made.

    reference   the model as training found it: its adapter switched off, or a copy that is never trained
    annotated   a source whose batches come with what the reference, or the model itself, says of them

Objectives stay functions of the model and a batch: what has no gradient is a number that the batch carries.
"""

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.data.batch import BatchSource, LiveSource
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.models.transformer import Transformer
from hanlin.train.objective import document_mask
from hanlin.train.token_loss import token_logprobs
from hanlin.tune.lora import without_adapter


def trained_hidden(model: Transformer, batch: SequenceBatch) -> Tensor:
    """The hidden states from which the trained tokens are predicted: (n, width)."""
    mask = document_mask(batch)
    return model(batch.ids, positions=batch.positions, mask=mask, logits=None).hidden[batch.trained.at]


def trained_logprobs(model: Transformer, batch: SequenceBatch, *, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the trained tokens, (n,) fp32 (fp64 for fp64), with gradient."""
    return token_logprobs(model, trained_hidden(model, batch), batch.trained.ids, temperature=temperature)[0]


class Reference:
    """The model as it was when this was made. With an adapter that is the model itself, adapter off (so without what an
    adapter that goes on had learnt before): no memory, no second set of weights; without one it is a copy. To be made
    before training, on freshly loaded weights: a run that goes on makes the same one. other: a model to compare with in
    the place of that."""

    def __init__(self, model: Transformer, other: Transformer | None = None) -> None:
        self._policy = model
        self._copy: Transformer | None = None
        if other is not None or not hasattr(model, "adapter"):
            self._copy = (other or copy.deepcopy(model)).requires_grad_(False).eval()

    @contextmanager
    def model(self) -> Generator[Transformer]:
        """The reference, without gradients and dropout, in the precision in which the policy computes now."""
        if self._copy is not None:
            self._copy.to(self._policy.device)
            self._copy.compute_dtype = self._policy.compute_dtype
            with torch.no_grad():
                yield self._copy
            return
        with looking(self._policy), without_adapter(self._policy):
            yield self._policy


@contextmanager
def looking(model: Transformer) -> Generator[None]:
    """Inside, the model is only looked through: no gradients, no dropout."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


@dataclass(frozen=True)
class Notes:
    """What is known of a batch without a gradient. numbers: of its documents (count,); tokens: of its trained ones
    (n, ...)."""

    numbers: Mapping[str, Tensor]
    tokens: Mapping[str, Tensor]


class Annotated:
    """A `LiveSource`: the batches of `source`, each with what `annotate(part)` finds.

    rows: so many at a time go through `annotate`, on `device()`. about: JSON that tells this annotation from another.
    """

    live = True

    def __init__(
        self,
        source: BatchSource,
        annotate: Callable[[SequenceBatch], Notes],
        *,
        device: Callable[[], torch.device],
        rows: int | None = None,
        about: Mapping[str, Any],
    ) -> None:
        if isinstance(source, LiveSource):
            raise HanlinError("A live source makes its own notes; it cannot be annotated again.")
        self.source, self._annotate, self._device, self._rows = source, annotate, device, rows
        self._about = dict(about)
        self.rows_per_step, self.steps_per_epoch = source.rows_per_step, source.steps_per_epoch

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> SequenceBatch:
        batch = self.source.batch(step, start, stop)
        assert isinstance(batch, SequenceBatch)
        size = self._rows or len(batch)
        parts = [batch.rows(at, min(at + size, len(batch))).to(self._device()) for at in range(0, len(batch), size)]
        found = [self._annotate(part) for part in parts]
        numbers = {name: torch.cat([note.numbers[name].cpu() for note in found]) for name in found[0].numbers}
        tokens = {name: torch.cat([note.tokens[name].cpu() for note in found]) for name in found[0].tokens}
        return batch.with_numbers(numbers, {name: batch.lay_trained(values) for name, values in tokens.items()})

    def fingerprint(self) -> dict[str, Any]:
        return {**self.source.fingerprint(), "notes": self._about}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass
