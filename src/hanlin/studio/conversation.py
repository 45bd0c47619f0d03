"""A conversation is a tree.

    question ─┬─ answer 1 ─── question ─── answer          a question can be edited: its variants form a fork;
              └─ answer 2 ─┬─ question ─── …               a turn can be answered again: every answer has its own
                           └─ question (edited) ─── …      continuation

With two models side by side a turn has a column of answers for each, and what follows belongs to the pair of answers
that stood there. One path through the tree is shown. Nothing is ever lost by editing: the rest stays reachable.

Values throughout: each change gives a new conversation. What an answer is, the tree does not ask; it has a `text`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

COLUMNS = 2
NONE = -1  # no answer in this column

Messages = list[dict[str, str]]
Chosen = tuple[int, ...]  # of each column: which answer


class Said(Protocol):
    text: str


A = TypeVar("A", bound=Said)


@dataclass(frozen=True)
class Turn(Generic[A]):
    """A question, all answers of each column, which of them are shown, and what followed each choice of them."""

    question: str
    answers: tuple[tuple[A, ...], ...] = ((),) * COLUMNS
    shown: Chosen = (NONE,) * COLUMNS
    later: Mapping[Chosen, "Fork[A]"] = field(default_factory=dict)

    def answer(self, column: int) -> A | None:
        """The answer that a column shows."""
        return None if self.shown[column] == NONE else self.answers[column][self.shown[column]]

    def heard(self, column: int) -> A | None:
        """The answer that a column's model remembers: its own, or the other's where it has none."""
        order = (column, *(other for other in range(COLUMNS) if other != column))
        return next((answer for each in order if (answer := self.answer(each)) is not None), None)


@dataclass(frozen=True)
class Fork(Generic[A]):
    """The variants of a question at one place, and which is shown."""

    turns: tuple[Turn[A], ...] = ()
    shown: int = NONE

    @property
    def turn(self) -> Turn[A]:
        return self.turns[self.shown]

    def put(self, turn: Turn[A]) -> "Fork[A]":
        """With the shown turn replaced."""
        return replace(self, turns=(*self.turns[: self.shown], turn, *self.turns[self.shown + 1 :]))


@dataclass(frozen=True)
class Conversation(Generic[A]):
    """A system prompt and the tree. Depth 0 is the first turn of the shown path."""

    system: str = ""
    start: Fork[A] = field(default_factory=Fork)

    def forks(self) -> list[Fork[A]]:
        """Those of the shown path, from the first, and at the end the empty one where it can go on."""
        forks = [self.start]
        while forks[-1].turns:
            turn = forks[-1].turn
            forks.append(turn.later.get(turn.shown) or Fork())
        return forks

    def path(self) -> list[Turn[A]]:
        """The shown turns."""
        return [fork.turn for fork in self.forks()[:-1]]

    def ask(self, question: str, depth: int | None = None) -> "Conversation[A]":
        """A question at the end; or, as an edit, in place of the one at a depth, which stays beside it."""
        turn: Turn[A] = Turn(question)
        place = len(self.path()) if depth is None else depth
        return self._change(place, lambda fork: Fork((*fork.turns, turn), len(fork.turns)))

    def show_question(self, depth: int, index: int) -> "Conversation[A]":
        """Another variant of a question, with all that followed it."""
        return self._change(depth, lambda fork: replace(fork, shown=_within(index, len(fork.turns))))

    def add_answer(self, depth: int, column: int, answer: A) -> "Conversation[A]":
        """One more answer of a column, which is shown."""

        def add(fork: Fork[A]) -> Fork[A]:
            answers = _put(fork.turn.answers, column, (*fork.turn.answers[column], answer))
            shown = _put(fork.turn.shown, column, len(answers[column]) - 1)
            return fork.put(replace(fork.turn, answers=answers, shown=shown))

        return self._change(depth, add)

    def show_answer(self, depth: int, column: int, index: int) -> "Conversation[A]":
        """Another answer of a column, with all that followed it."""

        def show(fork: Fork[A]) -> Fork[A]:
            chosen = _within(index, len(fork.turn.answers[column]))
            return fork.put(replace(fork.turn, shown=_put(fork.turn.shown, column, chosen)))

        return self._change(depth, show)

    def messages(self, column: int = 0, depth: int | None = None) -> Messages:
        """What a column's model has heard, up to the question at a depth (without its answer), or all of it."""
        messages: Messages = [{"role": "system", "content": self.system}] if self.system else []
        path = self.path()
        for number, turn in enumerate(path if depth is None else path[: depth + 1]):
            messages.append({"role": "user", "content": turn.question})
            answer = turn.heard(column)
            if answer is not None and number != depth:
                messages.append({"role": "assistant", "content": answer.text})
        return messages

    def _change(self, depth: int, change: Callable[[Fork[A]], Fork[A]]) -> "Conversation[A]":
        forks = self.forks()
        if not 0 <= depth < len(forks):
            raise IndexError(f"depth {depth} of a conversation of {len(forks) - 1} turns")
        new = change(forks[depth])
        for fork in reversed(forks[:depth]):
            new = fork.put(replace(fork.turn, later={**fork.turn.later, fork.turn.shown: new}))
        return replace(self, start=new)


T = TypeVar("T")


def _put(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _within(index: int, count: int) -> int:
    if not 0 <= index < count:
        raise IndexError(f"variant {index} of {count}")
    return index
