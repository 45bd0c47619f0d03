"""The values that go into and come out of the engine."""

from dataclasses import dataclass, field
from typing import Literal

from hanlin.core.errors import HanlinError

FinishReason = Literal["stop", "length", "abort"]
ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]

EVERY = -1  # `logprobs`: of the whole vocabulary


class Busy(HanlinError):  # noqa: N818 (a state, not a mistake)
    """The engine's queue is full; the server answers 429."""


@dataclass(frozen=True)
class Constraint:
    """What the output must match. value: a JSON schema as JSON text; nothing (any JSON object); a regular expression;
    a JSON list of strings; a grammar in Lark's notation as llguidance reads it."""

    kind: ConstraintKind
    value: str = ""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The order, whatever is switched on:

        logit bias, bans → repetition → presence, frequency → DRY → temperature → top-k → top-p → min-p → typical → draw

    filters_first: the filters see the untempered distribution, and the temperature comes last
    (top-k → top-p → min-p → typical → temperature → draw), as some people expect.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0, typical_p 1: off. A tie with the last token that a filter keeps
    is kept too. min_p (arXiv:2407.01082) drops tokens below min_p times the top probability; typical_p (locally
    typical sampling, arXiv:2202.00666) keeps those whose surprise is nearest to the entropy, until they reach this
    mass.

    Against repetition: repetition_penalty (CTRL, arXiv:1909.05858) divides positive and multiplies negative logits of
    every token of the prompt or the output; presence_penalty and frequency_penalty are subtracted for tokens of the
    output, once or as often as they stand there; no_repeat_ngram forbids every n-gram a second time; DRY subtracts
    dry_multiplier * dry_base^(n - dry_allowed_length) from a token that would prolong a repeated run of n tokens,
    n ≥ dry_allowed_length, and looks no further back than the last of dry_breakers.

    logit_bias: ((token, added), …); bad_words: token sequences that are never completed; constraint: what the output
    must match.

    stop: the text ends before the first of these strings (after it with include_stop); stop_token_ids: ends at these
    tokens (besides the model's own end tokens, unless ignore_eos), which are no part of the text. min_tokens: before so
    many tokens nothing ends it, end tokens are not drawn, stop strings not looked for. seed: the draws of this request,
    whatever runs beside it.

    logprobs: None, or how many alternatives to report beside each chosen token, under the model's own distribution
    (temperature 1, before every filter); -1: the whole vocabulary. prompt_logprobs: the same for each token of the
    prompt but the first; prompt_logprobs_from: from this token of the prompt on, so that what stands before it may come
    from the pages of another prompt that began alike. n: how many completions; best_of: how many are drawn, of which
    the n with the highest mean log-probability are returned.

    beams: beam search of so many beams (1: off), which returns the n best; length_penalty: the sum of log-probabilities
    is divided by length^length_penalty; early_stopping: stop as soon as there are `beams` finished ones; beam_groups,
    diversity_penalty: diverse beam search (arXiv:1610.02424). contrast: contrastive search (arXiv:2202.06417): of the
    top_k candidates the one with the highest (1 - contrast) * p - contrast * (greatest cosine to what was written).
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    filters_first: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_breakers: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    constraint: Constraint | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    n: int = 1
    best_of: int | None = None
    beams: int = 1
    beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool = False
    contrast: float = 0.0

    def __post_init__(self) -> None:
        most = "between -2 and 2"
        checks = [
            (self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "between 0 and max_tokens"),
            (0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "between 0 and 100"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (off) or more"),
            (0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1"),
            (0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 and 1"),
            (0.0 < self.typical_p <= 1.0, "typical_p", self.typical_p, "above 0 and at most 1"),
            (self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "above 0 (1 is off)"),
            (-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", self.presence_penalty, most),
            (-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", self.frequency_penalty, most),
            (self.no_repeat_ngram >= 0, "no_repeat_ngram", self.no_repeat_ngram, "0 (off) or more"),
            (self.dry_multiplier >= 0.0, "dry_multiplier", self.dry_multiplier, "0 (off) or more"),
            (self.dry_base >= 1.0, "dry_base", self.dry_base, "at least 1"),
            (self.dry_allowed_length >= 1, "dry_allowed_length", self.dry_allowed_length, "at least 1"),
            (all(self.bad_words), "bad_words", self.bad_words, "non-empty sequences of tokens"),
            (not isinstance(self.stop, str) and all(self.stop), "stop", self.stop, "a tuple of non-empty strings"),
            (self.logprobs is None or self.logprobs >= EVERY, "logprobs", self.logprobs, "-1 (all), 0 or more"),
            (
                self.prompt_logprobs is None or self.prompt_logprobs >= EVERY,
                "prompt_logprobs",
                self.prompt_logprobs,
                "-1 (all), 0 or more",
            ),
            (self.prompt_logprobs_from >= 1, "prompt_logprobs_from", self.prompt_logprobs_from, "at least 1"),
            (self.n >= 1, "n", self.n, "at least 1"),
            (self.best_of is None or self.best_of >= self.n, "best_of", self.best_of, "at least n"),
            (self.beams >= 1, "beams", self.beams, "at least 1 (off)"),
            (self.beams == 1 or self.n <= self.beams, "n", self.n, "at most the number of beams"),
            (self.beam_groups >= 1, "beam_groups", self.beam_groups, "at least 1 (off)"),
            (self.beams % self.beam_groups == 0, "beam_groups", self.beam_groups, "a divisor of beams"),
            (self.diversity_penalty >= 0.0, "diversity_penalty", self.diversity_penalty, "0 or more"),
            (0.0 <= self.contrast <= 1.0, "contrast", self.contrast, "between 0 (off) and 1"),
            (not self.contrast or self.top_k >= 1, "top_k", self.top_k, "at least 1 for contrastive search"),
            (not self.contrast or self.beams == 1, "beams", self.beams, "1 with contrastive search"),
            (not self.contrast or self.copies == 1, "n", self.n, "1 with contrastive search, which draws nothing"),
            (self.best_of is None or self.beams == 1, "best_of", self.best_of, "unset with beam search"),
        ]
        for good, name, found, expected in checks:
            if not good:
                raise HanlinError(f"{name} is {found!r}; it must be {expected}.")

    @property
    def copies(self) -> int:
        """Sequences that are drawn side by side."""
        return self.n if self.best_of is None else self.best_of


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log-probability and, if asked for, the likeliest alternatives [(id, logprob)], best first.

    kept: the part of the tempered distribution that the filters left, 1 without any (for exact behaviour
    probabilities). drawn: the log-probability under the distribution that was drawn from, filters and all.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    kept: float = 1.0
    drawn: float = 0.0


@dataclass(frozen=True)
class Usage:
    """Token counts of a request and its times in seconds since it was submitted: to the first token, and in total.
    cached_tokens: how many of the prompt's were not computed, because an earlier sequence began with the same.
    preemptions: how often it lost its pages and was computed again. drafted, accepted: tokens of speculation."""

    prompt_tokens: int
    completion_tokens: int
    first_token_s: float = 0.0
    total_s: float = 0.0
    cached_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def inter_token_s(self) -> float:
        """Mean time between two tokens after the first."""
        return (self.total_s - self.first_token_s) / max(1, self.completion_tokens - 1)


@dataclass(frozen=True)
class Completion:
    """What a prompt became. `text` has no stop string and no special tokens; `token_ids` has every generated token.
    score: of beam search, the sum of log-probabilities over length^length_penalty; of best_of, the mean."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason
    usage: Usage
    index: int = 0  # which of the `n` completions of its prompt
    prompt_logprobs: list[TokenLogprob] | None = None  # of the prompt's tokens from prompt_logprobs_from on
    score: float | None = None
    stop: str | int | None = None  # the stop string or end token that ended it


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
    """What the engine does now, and what it did since it was made.

    cache_usage: the part of the device's pages that running sequences hold, 0 to 1. seconds: of all steps that
    computed; prefill_seconds, decode_seconds: the same, shared out by the tokens of each step; so prefill and decode
    tokens a second are computed_prompt_tokens / prefill_seconds and generated_tokens / decode_seconds.
    step_tokens: of the last step.
    """

    running: int
    waiting: int
    cache_usage: float
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: dict[str, int]
    preemptions: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    computed_prompt_tokens: int = 0
    step_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    host_pages: int = 0
    disk_pages: int = 0
    loaded_pages: int = 0
