"""`Example`: one short sequence of tokens that is trained as a whole, such as a conversation."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """trained[i]: the model has to predict token i from those before it; the first token is never predicted.

    name: where it comes from (`chats.jsonl:17`), for errors. numbers: what else a method wants to know of it, such as a
    score; the examples of one source all have the same ones.
    """

    ids: list[int]
    trained: list[bool]
    name: str
    numbers: Mapping[str, float] = field(default_factory=dict)
