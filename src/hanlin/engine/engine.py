"""`Engine`: prompts in, completions out, many at once.

The scheduler knows no phases: a request has tokens and how many of them are computed; each step computes some of what is
missing and samples for those that have caught up. One worker thread owns the model and the cache; `submit` is safe from
any thread, which is what the server calls. Later a paged cache, prefix sharing and speculation slot in behind this face.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hanlin.engine.types import Completion, Event, SamplingParams
from hanlin.models.transformer import Transformer
from hanlin.tokens import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]  # text, token ids, or chat messages


class Engine:
    """Continuous batching over one model.

    max_batch: sequences computed together; max_waiting: requests that may queue beyond them (`submit` raises `Busy`
    past that); max_context: tokens a sequence may hold, prompt and output (default: the model's); max_prefill_tokens:
    prompt tokens computed in one step, so that a long prompt does not stall the others.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        max_waiting: int = 256,
        max_context: int | None = None,
        max_prefill_tokens: int = 2048,
    ) -> None:
        raise NotImplementedError

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", device: str = "auto", **limits: int
    ) -> "Engine":
        """The model and tokenizer of a folder."""
        raise NotImplementedError

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """All prompts together; returns n completions a prompt, in the order of the prompts."""
        raise NotImplementedError

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Event]:
        """Events of one prompt as they come; closing the iterator aborts the request."""
        raise NotImplementedError

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> "RequestHandle":
        """Queue a request. Raises `HanlinError` for a prompt that does not fit, `Busy` when the queue is full."""
        raise NotImplementedError

    def close(self) -> None:
        """Abort what runs and stop the worker."""
        raise NotImplementedError


class RequestHandle:
    """A request under way: iterate its events (blocking), or `abort()` it. `on_event` is called from the worker thread."""
