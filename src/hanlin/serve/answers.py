"""The objects of the OpenAI interface that go out: chat completions, text completions, and their chunks.

Plain dictionaries: the shapes are the interface's, and a stream sends thousands of them.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hanlin.engine import Completion, TokenLogprob
from hanlin.serve.spelling import Placed, Ruler, spell
from hanlin.tokens import Tokenizer

DONE = b"data: [DONE]\n\n"


def server_sent_event(value: Mapping[str, Any]) -> bytes:
    """One `data:` line of a stream."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage_of(completions: Sequence[Completion], *, prompt_tokens: int) -> dict[str, Any]:
    """Token counts of a whole request; prompt_tokens counts every prompt once, however many completions it has."""
    generated = sum(completion.usage.completion_tokens for completion in completions)
    cached = sum(completion.usage.cached_tokens for completion in completions if completion.index == 0)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


@dataclass(frozen=True)
class Envelope:
    """What all chunks of an answer share: the same id, time and model."""

    kind: str  # "chat.completion" or "text_completion"
    model: str
    prefix: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(
        self, choices: list[dict[str, Any]], *, chunk: bool = False, usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if chunk and self.kind == "chat.completion" else self.kind
        shared = {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return shared | {"choices": choices} | ({"usage": usage} if usage is not None else {})


def chat_logprobs(tokens: Sequence[Placed], tokenizer: Tokenizer) -> dict[str, Any]:
    """Chat form: an object a token with its bytes, which joined are the text's."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": spell(raw), "logprob": finite(logprob), "bytes": list(raw)}

    content = [
        one(token.token_id, token.logprob) | {"top_logprobs": [one(*alternative) for alternative in token.top]}
        for _, token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[int | TokenLogprob], tokenizer: Tokenizer, ruler: Ruler) -> dict[str, Any]:
    """Completions form: four parallel lists with an entry a token, end tokens too (evaluation tools count them).

    A bare id has no probability: the first token of an echoed prompt.
    """
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        token_id = token if isinstance(token, int) else token.token_id
        name = spell(tokenizer.token_bytes(token_id))
        lists["tokens"].append(name)
        lists["text_offset"].append(ruler.place(token_id))
        if isinstance(token, int):
            lists["token_logprobs"].append(None)
            lists["top_logprobs"].append(None)
        else:
            top = {spell(tokenizer.token_bytes(t)): finite(logprob) for t, logprob in token.top}
            lists["token_logprobs"].append(finite(token.logprob))
            lists["top_logprobs"].append(top | {name: finite(token.logprob)})
    return lists


def finite(logprob: float) -> float:
    """JSON has no -Infinity; OpenAI writes -9999."""
    return max(logprob, -9999.0)
