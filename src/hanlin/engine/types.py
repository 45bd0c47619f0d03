"""The values that go into and come out of the engine."""

from dataclasses import dataclass, field
from typing import Literal

from hanlin.core.errors import HanlinError

FinishReason = Literal["stop", "length", "abort"]


class Busy(HanlinError):  # noqa: N818 (a state, not a mistake)
    """The engine's queue is full; the server answers 429."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Order: repetition penalty → temperature → top-k → top-p → min-p → draw.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0, repetition_penalty 1: off.
    repetition_penalty (CTRL, arXiv:1909.05858): divides positive and multiplies negative logits of every token that
    stands in the prompt or the output. min_p (arXiv:2407.01082): drops tokens below min_p times the top probability.
    A tie with the last token that a filter keeps is kept too.
    stop: the text ends before the first of these strings; stop_token_ids: ends at these tokens (besides the model's own
    end tokens, unless ignore_eos), which are no part of the text. min_tokens: before so many tokens nothing ends it,
    end tokens are not drawn, stop strings not looked for. seed: the draws of this request, whatever runs beside it.
    logprobs: None, or how many alternatives to report beside each chosen token, under the model's own distribution
    (temperature 1, before every filter). n: how many independent completions.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        checks = [
            (self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "between 0 and max_tokens"),
            (0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "between 0 and 100"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (off) or more"),
            (0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1"),
            (0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 and 1"),
            (self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "above 0 (1 is off)"),
            (not isinstance(self.stop, str) and all(self.stop), "stop", self.stop, "a tuple of non-empty strings"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", self.logprobs, "between 0 and 20"),
            (self.n >= 1, "n", self.n, "at least 1"),
        ]
        for good, name, found, expected in checks:
            if not good:
                raise HanlinError(f"{name} is {found!r}; it must be {expected}.")


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log-probability and, if asked for, the likeliest alternatives [(id, logprob)], best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of a request and its times in seconds since it was submitted: to the first token, and in total.
    cached_tokens: how many of the prompt's were not computed, because an earlier sequence began with the same."""

    prompt_tokens: int
    completion_tokens: int
    first_token_s: float = 0.0
    total_s: float = 0.0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """What a prompt became. `text` has no stop string and no special tokens; `token_ids` has every generated token."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason
    usage: Usage
    index: int = 0  # which of the `n` completions of its prompt


@dataclass(frozen=True)
class Event:
    """A piece of a streamed completion. The texts of all events concatenated are `Completion.text`; a piece never holds
    half a character, and text that may be the start of a stop string is held back until it is decided.

    completion: the whole, on the last event of each index and only there.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    index: int = 0
    completion: Completion | None = None


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it did since it was made. cache_usage: how full the running sequences' slots
    are, 0 to 1."""

    running: int
    waiting: int
    cache_usage: float
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: dict[str, int]
