"""The models that a server offers: a name for each engine and for each adapter on it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from hanlin.engine import Engine
from hanlin.serve.access import account_of
from hanlin.serve.errors import ApiError


@dataclass(frozen=True)
class Served:
    """What a name stands for: an engine, bare or with an adapter. base: the engine's own name."""

    name: str
    engine: Engine
    base: str
    adapter: str | None = None


@dataclass(frozen=True)
class Models:
    """Name -> engine, in the order in which they are listed; the first answers requests that name none."""

    engines: Mapping[str, Engine]
    created: int = field(default_factory=lambda: int(time.time()))

    def served(self, allowed: Sequence[str] | None = None) -> dict[str, Served]:
        """Everything that a request may name. allowed: the only adapters."""
        found = {name: Served(name, engine, name) for name, engine in self.engines.items()}
        for base, engine in self.engines.items():
            for adapter in engine.adapters():
                if allowed is None or adapter in allowed:
                    found.setdefault(adapter, Served(adapter, engine, base, adapter))
        return found

    def find(self, name: str | None, allowed: Sequence[str] | None = None) -> Served:
        """What a request names, or `ApiError` 404."""
        served = self.served(allowed)
        found = next(iter(served)) if name is None else name
        if found not in served:
            known = ", ".join(f"'{known}'" for known in served)
            message = f"The model '{found}' does not exist here. This server has {known}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return served[found]

    def describe(self, served: Served) -> dict[str, Any]:
        """The object of /v1/models; max_model_len, root and parent are vLLM's."""
        return {
            "id": served.name,
            "object": "model",
            "created": self.created,
            "owned_by": "hanlin",
            "max_model_len": served.engine.max_context,
            "root": served.base,
            "parent": None if served.adapter is None else served.base,
        }


def models_of(request: Request) -> Models:
    """The models of the app that a request came to."""
    return request.app.state.models


def find_model(request: Request, name: str | None) -> Served:
    """What this request's key may use under this name."""
    return models_of(request).find(name, account_of(request).key.adapters)


def room_for(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int | None, *, param: str) -> int:
    """How many tokens each answer may have: as asked for, or what the context leaves. 400 if that is too much."""
    longest = max(map(len, prompts))
    room = engine.max_context - longest
    wanted = max(room, 1) if max_tokens is None else max_tokens
    if wanted > room:
        message = (
            f"This model's context holds {engine.max_context} tokens, but the request needs {longest + wanted}: "
            f"{longest} of the prompt and {'at least ' if max_tokens is None else ''}{wanted} of the answer. "
            "Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return wanted
