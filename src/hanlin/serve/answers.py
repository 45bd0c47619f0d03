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


def server_sent_event(value: Mapping[str, Any], *, name: str | None = None) -> bytes:
    """One `data:` line of a stream, behind an `event:` line if it has a name."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage_of(
    completions: Sequence[Completion], *, prompt_tokens: int, reasoning_tokens: int | None = None
) -> dict[str, Any]:
    """Token counts of a whole request; prompt_tokens counts every prompt once, however many completions it has."""
    generated = sum(completion.usage.completion_tokens for completion in completions)
    cached = sum(completion.usage.cached_tokens for completion in completions if completion.index == 0)
    return usage(prompt_tokens, generated, cached, reasoning_tokens)


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None, reasoning_tokens: int | None = None
) -> dict[str, Any]:
    """The usage object; details only where they are known."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if cached_tokens is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    if reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return counts


def fresh_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Envelope:
    """What all chunks of an answer share: the same id, time and model."""

    kind: str  # "chat.completion" or "text_completion"
    model: str
    prefix: str
    id: str = field(default_factory=fresh_id)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def full_id(self) -> str:
        return f"{self.prefix}-{self.id}"

    @property
    def head(self) -> dict[str, Any]:
        return {"id": self.full_id, "object": self.kind, "created": self.created, "model": self.model}

    def wrap(
        self,
        choices: list[dict[str, Any]],
        *,
        chunk: bool = False,
        usage: dict[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if chunk and self.kind == "chat.completion" else self.kind
        return (
            self.head | {"object": kind} | {"choices": choices} | ({"usage": usage} if usage is not None else {}) | more
        )


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


def prompt_logprobs(scored: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """vLLM's form: nothing for the first token, then a mapping from ids to what is known of them.

    rank: among all tokens, where it is known, that is among the alternatives asked for.
    """
    entries: list[dict[str, Any] | None] = [None]
    for token in scored:
        ranks = {other: rank for rank, (other, _) in enumerate(token.top, 1)}
        known = dict(token.top) | {token.token_id: token.logprob}
        entries.append(
            {
                str(other): {
                    "logprob": finite(logprob),
                    "rank": ranks.get(other),
                    "decoded_token": spell(tokenizer.token_bytes(other)),
                }
                for other, logprob in known.items()
            }
        )
    return entries


def finite(logprob: float) -> float:
    """JSON has no -Infinity; OpenAI writes -9999."""
    return max(logprob, -9999.0)
