"""`Example`: one short sequence of tokens that is trained as a whole, such as a conversation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """trained[i]: the model has to predict token i from those before it; the first token is never predicted.

    name: where it comes from (`chats.jsonl:17`), for errors.
    """

    ids: list[int]
    trained: list[bool]
    name: str
