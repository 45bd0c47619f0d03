"""Reasoning apart from the answer: what stands between `<think>` and `</think>` is not content.

Models differ in who writes the opening: the model itself, or the chat template at the end of the prompt. Either way
only a beginning counts (a `<think>` later in the answer is text), and text that may be a marker is held back until it
is decided, so the pieces joined do not depend on how the text was cut. Blanks around the reasoning are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hanlin.tokens import Tokenizer

MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))


@dataclass(frozen=True)
class ReasoningFormat:
    """opened: the prompt already ends inside the reasoning."""

    opening: str
    closing: str
    opened: bool = False


@dataclass(frozen=True)
class Split:
    """What a piece of text adds to the reasoning and to the content."""

    reasoning: str = ""
    content: str = ""


def reasoning_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> ReasoningFormat | None:
    """How the answer to this prompt marks its reasoning; None if this model's vocabulary has no such markers.

    A prompt that ends with closed reasoning (thinking switched off) gets None as well: all that follows is content.
    """
    for opening, closing in MARKERS:
        if any(len(tokenizer.encode(marker, special=True)) != 1 for marker in (opening, closing)):
            continue
        end = tokenizer.decode(prompt[-16:], skip_special=False).rstrip()
        if end.endswith(closing):
            return None
        return ReasoningFormat(opening, closing, opened=end.endswith(opening))
    return None


class ReasoningParser:
    """Takes the text of one answer piece by piece; `push` and `finish` give what is certain."""

    def __init__(self, form: ReasoningFormat) -> None:
        self._form = form
        self._state = "before"
        self._held = ""
        self._fresh = True  # nothing but blanks so far in this state

    @property
    def thinking(self) -> bool:
        """Whether the reasoning is open."""
        return self._state == "reasoning" or (self._state == "before" and self._form.opened)

    def push(self, text: str) -> Split:
        """The next piece of the text."""
        self._held += text
        return self._go_on(closed=False)

    def finish(self) -> Split:
        """No more text: the rest."""
        return self._go_on(closed=True)

    def _go_on(self, *, closed: bool) -> Split:
        reasoning = content = ""
        if self._state == "before":
            self._before(closed=closed)
        if self._state == "reasoning":
            reasoning = self._inside(closed=closed)
        if self._state == "content":
            content = self._after(closed=closed)
        return Split(reasoning, content)

    def _before(self, *, closed: bool) -> None:
        """Decide whether the answer begins with reasoning; some models open again what the prompt has opened."""
        begin = self._held.lstrip()
        if begin.startswith(self._form.opening):
            self._held, self._state = begin[len(self._form.opening) :], "reasoning"
        elif closed or not self._form.opening.startswith(begin):
            self._state = "reasoning" if self._form.opened else "content"
            self._fresh = self._form.opened

    def _inside(self, *, closed: bool) -> str:
        """Reasoning without the blanks at its ends, up to the closing."""
        if self._fresh:
            self._held = self._held.lstrip()
        before, found, behind = self._held.partition(self._form.closing)
        if found:
            self._held, self._state, self._fresh = behind, "content", True
            return before.rstrip()
        keep = 0 if closed else _undecided(self._held, self._form.closing)
        due = self._held[: len(self._held) - keep].rstrip()
        self._held = self._held[len(due) :] if not closed else ""
        self._fresh = self._fresh and not due
        return due

    def _after(self, *, closed: bool) -> str:
        if self._fresh:
            self._held = self._held.lstrip()
            self._fresh = not self._held
        due, self._held = self._held, ""
        return due


def _undecided(text: str, marker: str) -> int:
    """Length of the longest end of the text that the marker begins with."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if marker.startswith(text[-n:])), 0)
