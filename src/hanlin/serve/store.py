"""What /v1/responses remembers: the last answers, in memory, each for the key that asked for it.

The oldest is forgotten when there are too many; nothing outlives the process.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from hanlin.serve.errors import ApiError
from hanlin.serve.generation import Generation


@dataclass
class Kept:
    """response: the object as it was last sent; messages: the conversation through it, in chat form, without the
    instructions, which belong to one request; items: what was put in, as it was sent."""

    owner: str
    response: dict[str, Any]
    messages: list[dict[str, Any]]
    items: list[Any] = field(default_factory=list)
    generation: Generation | None = None


class ResponseStore:
    """At most `limit` answers; 0 keeps none."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, kept: Kept) -> None:
        """Keep it, or its newer state; those under way are never forgotten for younger ones."""
        self._kept[kept.response["id"]] = kept
        ended = [key for key, one in self._kept.items() if one.generation is None]
        for key in ended[: max(0, len(self._kept) - self._limit)]:
            del self._kept[key]

    def get(self, key: str, owner: str, *, param: str = "response_id") -> Kept:
        """What was kept under this id for this owner, or `ApiError` 404."""
        kept = self._kept.get(key)
        if kept is None or kept.owner != owner:
            message = f"There is no response '{key}' here. At most {self._limit} are kept, the newest."
            raise ApiError(404, message, param=param, code="response_not_found")
        return kept

    def drop(self, key: str, owner: str) -> None:
        self.get(key, owner)
        del self._kept[key]
