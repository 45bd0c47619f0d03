"""The models that a server offers: a name for each engine, and the checks that both kinds of request share."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from hanlin.engine import Engine, SamplingParams
from hanlin.serve.errors import ApiError
from hanlin.serve.requests import Sampled


@dataclass(frozen=True)
class Models:
    """Name -> engine, in the order in which they are listed; the first answers requests that name none."""

    engines: Mapping[str, Engine]
    created: int = field(default_factory=lambda: int(time.time()))

    def find(self, name: str | None) -> tuple[str, Engine]:
        """The model of a request, or `ApiError` 404."""
        found = next(iter(self.engines)) if name is None else name
        if found not in self.engines:
            known = ", ".join(f"'{known}'" for known in self.engines)
            message = f"The model '{found}' does not exist here. This server has {known}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return found, self.engines[found]

    def describe(self, name: str) -> dict[str, Any]:
        """The object of /v1/models; max_model_len is vLLM's name for the context."""
        engine = self.engines[name]
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "hanlin",
            "max_model_len": engine.max_context,
        }


def models_of(request: Request) -> Models:
    """The models of the app that a request came to."""
    return request.app.state.models


def make_params(
    body: Sampled, engine: Engine, prompts: Sequence[list[int]], *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """The engine's parameters; without max_tokens, what the context leaves. 400 if the longest prompt does not fit."""
    longest = max(map(len, prompts))
    room = engine.max_context - longest
    wanted = max(room, 1) if max_tokens is None else max_tokens
    if wanted > room:
        message = (
            f"This model's context holds {engine.max_context} tokens, but the request needs {longest + wanted}: "
            f"{longest} of the prompt and {'at least ' if max_tokens is None else ''}{wanted} of the answer. "
            "Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    return body.sampling(max_tokens=wanted, logprobs=logprobs)
