"""What a client may ask for: the bodies of the routes as pydantic models, read strictly and refused precisely.

Types are strict ("0.5" is not a number), an unknown key is an error that names its neighbour, and what is known but
does not act is refused by name (`refusals.py`).
"""

import json
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.requests import ClientDisconnect

from hanlin.engine import SamplingParams
from hanlin.serve.errors import ApiError
from hanlin.serve.refusals import drop_neutral

MAX_BODY_BYTES = 16 * 2**20
MAX_PROMPTS = 2048

Body = TypeVar("Body", bound="Strict")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False


class Sampled(Strict):
    """What chat and completion requests share. Where OpenAI has no such parameter, the name is vLLM's."""

    model: str | None = None
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0.0, le=100.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1, description="0 or -1: off")
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0, le=100.0)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=1024)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="plain")
    @classmethod
    def _read_stop(cls, found: Any) -> list[str]:
        stop = [found] if isinstance(found, str) else found
        if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(text, str) and text for text in stop):
            raise ValueError("must be a non-empty string or a list of at most 16 of them")
        return stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_together(self, *, vocab_size: int) -> None:
        """The rules between parameters, and those that need the model."""
        if self.stream_options is not None and not self.stream:
            message = "'stream_options' has a meaning only with 'stream': true."
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                message = f"'stop_token_ids' has {token}; this model's ids go from 0 to {vocab_size - 1}."
                raise ApiError(400, message, param="stop_token_ids", code="invalid_value")

    def sampling(self, *, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """These wishes as the engine's parameters."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            seed=self.seed,
            logprobs=logprobs,
            n=self.n,
        )


class Message(Strict):
    """One turn. Content is a string or a list of text parts, which are joined by line breaks."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    name: str | None = None

    @field_validator("content", mode="plain")
    @classmethod
    def _read_content(cls, found: Any) -> str:
        if isinstance(found, str):
            return found
        if not isinstance(found, list) or not found:
            raise ValueError("must be a string or a non-empty list of text parts")
        for part in found:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"has a part of type {kind!r}; only {{'type': 'text', 'text': '…'}} is supported")
        return "\n".join(part["text"] for part in found)

    def as_dict(self) -> dict[str, Any]:
        """For the chat template, which knows no developer: it is the system's newer name."""
        turn = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return turn | ({"name": self.name} if self.name is not None else {})


class ChatRequest(Sampled):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def check_together(self, *, vocab_size: int) -> None:
        super().check_together(vocab_size=vocab_size)
        if self.top_logprobs is not None and not self.logprobs:
            message = "'top_logprobs' has a meaning only with 'logprobs': true."
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "'max_tokens' and 'max_completion_tokens' are two names of one limit and differ; send one."
            raise ApiError(400, message, param="max_tokens", code="invalid_value")


class CompletionRequest(Sampled):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0, description="0 only together with echo: the prompt's log-probabilities")
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("prompt", mode="plain")
    @classmethod
    def _read_prompt(cls, found: Any) -> Any:
        if isinstance(found, str) or _is_ids(found):
            return found
        many = found if isinstance(found, list) and len(found) <= MAX_PROMPTS else []
        if many and (all(isinstance(item, str) for item in many) or all(_is_ids(item) for item in many)):
            return many
        raise ValueError(
            "must be a string, a list of strings, a list of token ids or a list of such lists, "
            f"none empty and at most {MAX_PROMPTS} prompts"
        )

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several prompts as a list of them."""
        alone: Any = self.prompt
        return [alone] if isinstance(alone, str) or _is_ids(alone) else alone

    def check_together(self, *, vocab_size: int) -> None:
        super().check_together(vocab_size=vocab_size)
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "'max_tokens' is 0: nothing to do without 'echo'.", param="max_tokens")
        for prompt in self.prompts:
            wrong = [token for token in prompt if isinstance(token, int) and not 0 <= token < vocab_size]
            if wrong:
                message = f"'prompt' has the id {wrong[0]}; this model's ids go from 0 to {vocab_size - 1}."
                raise ApiError(400, message, param="prompt", code="invalid_value")


class TokenizeRequest(Strict):
    """POST /tokenize: text, or a conversation through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)


class DetokenizeRequest(Strict):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]


def _is_ids(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(type(item) is int for item in found)


async def read_request(request: Request, kind: type[Body]) -> Body:
    """The body of a request as a checked value, or `ApiError` 400 / 413."""
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > MAX_BODY_BYTES:
                raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB.", code="body_too_large")
    except ClientDisconnect as error:
        raise ApiError(400, "The client left before its request was read.") from error
    body = _parse_object(bytes(raw))
    body = drop_neutral(body, known=kind.model_fields)
    options = body.get("stream_options")
    if isinstance(options, dict):
        body["stream_options"] = drop_neutral(options, known=StreamOptions.model_fields, place="stream_options.")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _explain(error) from error


def _parse_object(raw: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(raw, parse_constant=refuse)
        if b"\\u" in raw:  # an escaped half of a character pair is legal JSON but no text
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"The body must be a JSON object, not {type(body).__name__}.", code="invalid_json")
    return body


def _explain(error: ValidationError) -> ApiError:
    """The first complaint of pydantic as a sentence with the parameter's path, as in messages[0].role."""
    first = error.errors(include_url=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"'{path}' is not valid: {message}.", param=path, code="invalid_value")
