"""What chat and text completions share: how tokens are chosen, how an answer ends, what comes with it.

Where OpenAI has no such parameter the name is vLLM's; where vLLM has none, llama.cpp's (DRY, typical_p) or
transformers' (no_repeat_ngram_size, num_beam_groups, diversity_penalty, penalty_alpha).
"""

from typing import Any

from pydantic import Field, field_validator

from hanlin.core.errors import HanlinError
from hanlin.engine import SamplingParams
from hanlin.engine.types import Constraint
from hanlin.serve.errors import ApiError
from hanlin.serve.refusals import drop_neutral
from hanlin.serve.requests import Strict
from hanlin.serve.structured import GuidedFields
from hanlin.tokens import Tokenizer

MAX_STOPS, MAX_STOP_LENGTH, MAX_WORDS, MAX_BIAS = 16, 1024, 1024, 4096


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampled(GuidedFields):
    """The fields; `sampling` makes the engine's parameters of them."""

    n: int = Field(1, ge=1, le=128)
    best_of: int | None = Field(None, ge=1, le=128, description="with use_beam_search: the number of beams")
    temperature: float = Field(1.0, ge=0.0, le=100.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1, description="0 or -1: off")
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    typical_p: float = Field(1.0, gt=0.0, le=1.0)
    temperature_last: bool = Field(False, description="filter first, then apply the temperature")
    repetition_penalty: float = Field(1.0, gt=0.0, le=100.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    no_repeat_ngram_size: int = Field(0, ge=0, le=1024)
    dry_multiplier: float = Field(0.0, ge=0.0, le=100.0)
    dry_base: float = Field(1.75, ge=1.0, le=100.0)
    dry_allowed_length: int = Field(2, ge=1, le=1024)
    dry_sequence_breakers: list[str] = Field(default_factory=list, max_length=64)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=MAX_BIAS)
    bad_words: list[str] = Field(default_factory=list, max_length=MAX_WORDS)
    use_beam_search: bool = False
    length_penalty: float = Field(1.0, ge=-10.0, le=10.0)
    early_stopping: bool = False
    num_beam_groups: int = Field(1, ge=1, le=128)
    diversity_penalty: float = Field(0.0, ge=0.0, le=1000.0)
    penalty_alpha: float = Field(0.0, ge=0.0, le=1.0, description="contrastive search")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    stop_token_ids: list[int] = Field(default_factory=list, max_length=1024)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool = False
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1, description="lower is earlier")
    cache_salt: str = Field("", max_length=1024)
    request_id: str | None = Field(None, min_length=1, max_length=128)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="plain")
    @classmethod
    def _read_stop(cls, found: Any) -> list[str]:
        stop = [found] if isinstance(found, str) else found
        fits = isinstance(stop, list) and len(stop) <= MAX_STOPS
        if not fits or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in stop):
            raise ValueError(
                f"must be a non-empty string or a list of at most {MAX_STOPS} of them, each of at most "
                f"{MAX_STOP_LENGTH} characters"
            )
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _read_bias(cls, found: dict[str, float]) -> dict[str, float]:
        for token, bias in found.items():
            if not token.isascii() or not token.isdigit():
                raise ValueError(f"must map token ids to numbers, not {token!r}")
            if not -100.0 <= bias <= 100.0:
                raise ValueError(f"has {bias} for {token}; a bias lies between -100 and 100")
        return found

    @field_validator("bad_words", "dry_sequence_breakers")
    @classmethod
    def _no_empty(cls, found: list[str]) -> list[str]:
        if not all(0 < len(word) <= MAX_STOP_LENGTH for word in found):
            raise ValueError(f"must be non-empty strings of at most {MAX_STOP_LENGTH} characters")
        return found

    @field_validator("stream_options", mode="before")
    @classmethod
    def _drop_neutral_options(cls, found: Any) -> Any:
        known = StreamOptions.model_fields
        return drop_neutral(found, known=known, place="stream_options.") if isinstance(found, dict) else found

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check_together(self, *, vocab_size: int) -> None:
        """The rules between parameters, and those that need the model."""
        if self.stream_options is not None and not self.stream:
            raise self._wrong("stream_options", "has a meaning only with 'stream': true")
        for name, tokens in (("stop_token_ids", self.stop_token_ids), ("logit_bias", map(int, self.logit_bias))):
            check_ids(name, tokens, vocab_size)
        if self.best_of is not None and self.best_of < self.n:
            raise self._wrong("best_of", f"is {self.best_of}, below n = {self.n}")
        if self.stream and not self.use_beam_search and (self.best_of or 1) > self.n:
            raise self._wrong("best_of", "cannot be streamed: which answers are best is known at the end")
        if not self.use_beam_search:
            idle = {"length_penalty": 1.0, "early_stopping": False, "num_beam_groups": 1, "diversity_penalty": 0.0}
            for name, off in idle.items():
                if getattr(self, name) != off:
                    raise self._wrong(name, "belongs to beam search: send 'use_beam_search': true")
        if not self.dry_multiplier and self.dry_sequence_breakers:
            raise self._wrong("dry_sequence_breakers", "has a meaning only with dry_multiplier above 0")

    def sampling(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> SamplingParams:
        """These wishes as the engine's parameters; what does not go together is `ApiError` 400."""
        beams = (self.best_of or self.n) if self.use_beam_search else 1
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_k=max(self.top_k, 0),
                top_p=self.top_p,
                min_p=self.min_p,
                typical_p=self.typical_p,
                filters_first=self.temperature_last,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                no_repeat_ngram=self.no_repeat_ngram_size,
                dry_multiplier=self.dry_multiplier,
                dry_base=self.dry_base,
                dry_allowed_length=self.dry_allowed_length,
                dry_breakers=tuple(tokenizer.encode(text)[-1] for text in self.dry_sequence_breakers),
                logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
                bad_words=spellings(tokenizer, self.bad_words),
                constraint=constraint,
                stop=tuple(self.stop),
                include_stop=self.include_stop_str_in_output,
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                min_tokens=self.min_tokens,
                seed=self.seed,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                n=self.n,
                best_of=None if self.use_beam_search else self.best_of,
                beams=beams,
                beam_groups=self.num_beam_groups,
                diversity_penalty=self.diversity_penalty,
                length_penalty=self.length_penalty,
                early_stopping=self.early_stopping,
                contrast=self.penalty_alpha,
            )
        except HanlinError as error:  # it begins with the parameter's name
            raise ApiError(400, str(error), param=str(error).split(" ")[0], code="invalid_value") from error

    @staticmethod
    def _wrong(name: str, what: str) -> ApiError:
        return ApiError(400, f"'{name}' {what}.", param=name, code="invalid_value")


def check_ids(name: str, tokens: Any, vocab_size: int) -> None:
    """Every id is one of the model's, or `ApiError` 400."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            message = f"'{name}' has {token}; this model's ids go from 0 to {vocab_size - 1}."
            raise ApiError(400, message, param=name, code="invalid_value")


def spellings(tokenizer: Tokenizer, words: list[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as tokens, at the beginning of a text and behind a space."""
    both = [tuple(tokenizer.encode(space + word)) for word in words for space in ("", " ")]
    return tuple(dict.fromkeys(ids for ids in both if ids))
