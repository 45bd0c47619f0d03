"""What a search over several sequences of one prompt has to say to the worker: beam search, contrastive search.

A search owns `members`: the sequences that are computed together, the request itself first. When all have caught up it
gets their log-probabilities and says with which sequences it goes on, each from one of them: those share pages until
they part. A member takes its last token only together with the others, so a search is the same whatever runs beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from hanlin.engine.request import Request


@dataclass(frozen=True)
class Branch:
    """A sequence to go on with: `ids` are those of member `parent` and one more token."""

    parent: int
    ids: list[int]


class Search(Protocol):
    """members: root first. sharing: known pages may stand for the prompt. wants_hidden: it is shown hidden states."""

    members: "list[Request]"
    sharing: bool
    wants_hidden: bool

    def see(self, member: int, start: int, hidden: Tensor) -> None:
        """hidden (T, width) of the tokens of a member from `start` on, as they are computed (only if wants_hidden;
        after a preemption the same tokens may come again)."""
        ...

    def advance(self, logprobs: Tensor) -> Sequence[Branch]:
        """logprobs (members, V): of each member's next token, processed as its parameters say. Empty: it has ended, and
        has told its root so (`Request.end_search`)."""
        ...
