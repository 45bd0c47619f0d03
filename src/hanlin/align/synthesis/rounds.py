"""Methods work in rounds, and a round is a line on disk: what was kept, what was dropped and why.

    rounds on disk ─→ absorb ─→ state ─→ next round: ask the writer ─→ one line, fsynced ─→ absorb ─→ …

A round asks what its number, the seed and the rounds before it say, nothing else. So a run that was killed loses the
round it was in, the same command goes on, and with a writer that answers alike the file comes out alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

Chat = Sequence[Mapping[str, str]]  # messages, the last of them the user's


class Ask(Protocol):
    """Chats of one step of a round -> answers, None where there is none. cut: take those that were cut short, too."""

    def __call__(self, step: str, chats: Sequence[Chat], *, cut: bool = False) -> list[str | None]: ...


@dataclass(frozen=True)
class Made:
    """One synthetic conversation. source: where its seed stands, or "pool"; method: how it was made; mark: what the
    method needs to know of it when it goes on (the place of the seed)."""

    messages: list[dict[str, str]]
    source: str
    method: str
    mark: int = 0

    @property
    def question(self) -> str:
        return self.messages[-2]["content"]

    def row(self) -> dict[str, Any]:
        """As it is written: OpenAI messages, which `objective: {kind: sft}` reads."""
        return {"messages": self.messages, "source": self.source, "method": self.method}


@dataclass
class Round:
    """What came of one round. asked: chats that the writer was given."""

    kept: list[Made] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)  # {"reason", "text", "source"}
    asked: int = 0

    def drop(self, reason: str, text: str | None, source: str) -> None:
        """Note why something is not kept."""
        self.dropped.append({"reason": reason, "text": text or "", "source": source})

    def row(self, number: int) -> dict[str, Any]:
        return {"step": number, **asdict(self)}

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Round":
        return cls([Made(**made) for made in row["kept"]], list(row["dropped"]), row["asked"])


class Method(Protocol):
    """One way to make conversations."""

    total: int  # of what `done` counts
    unit: str

    def done(self) -> int:
        """How much there is; the run ends at `total`."""
        ...

    def round(self, number: int, ask: Ask) -> Round:
        """Make the round of this number; changes nothing in the method."""
        ...

    def absorb(self, made: Round) -> None:
        """Go on from this round, made now or in an earlier run."""
        ...


def user(text: str) -> list[dict[str, str]]:
    """A chat of one question."""
    return [{"role": "user", "content": text}]


def answered(chat: Chat, answer: str) -> list[dict[str, str]]:
    """A chat with its answer."""
    return [*[dict(message) for message in chat], {"role": "assistant", "content": answer}]
