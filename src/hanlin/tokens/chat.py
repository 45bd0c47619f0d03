"""A conversation as tokens: what a person writes can never become a control token.

The template's own special tokens ("<|im_end|>" after a message) must become their ids; the same letters typed by a user
must stay letters, or anyone could end their own turn and speak as the system. So before the template runs, every
special spelling in the messages is replaced by a mark of characters that no text holds (Unicode noncharacters); the
rendered text is cut at the special tokens that stand in it, which are now all the template's; and the marks turn back
into letters in the pieces between, which are encoded with special tokens switched off. A conversation without such
spellings, the usual case, is rendered and encoded in one go, as `transformers` does.
"""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from hanlin.core.errors import HanlinError
from hanlin.tokens.chat_template import render

NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class RewritingTemplateError(HanlinError):
    """A template that rewrites what it has written before."""


@dataclass(frozen=True)
class Placed:
    """Tokens and where they stand in the rendered text: token i covers the characters spans[i][0] to spans[i][1]."""

    ids: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Guarded:
    """Messages (and whatever else a template is given) whose special spellings are marked; mark k, between the
    characters `left` and `right`, was marks[k]."""

    messages: list[dict[str, Any]]
    marks: tuple[str, ...]
    left: str = ""
    right: str = ""

    def restore(self, text: str) -> tuple[str, list[int]]:
        """The text with its marks as letters again, and where each of its characters (and its end) stands in `text`."""
        restored, origin, at = "", [], 0
        for mark in re.finditer(f"{self.left}(\\d+){self.right}", text):
            letters = self.marks[int(mark[1])]
            restored += text[at : mark.start()] + letters
            origin += [*range(at, mark.start()), *[mark.start()] * len(letters)]
            at = mark.end()
        return restored + text[at:], [*origin, *range(at, len(text) + 1)]


class ChatEncoder:
    """A chat template over one tokenizer.

    plain: special tokens in its input become ids. literal: they stay letters. template: Jinja. special: role ->
    spelling, for the template's variables.
    """

    def __init__(
        self,
        plain: tokenizers.Tokenizer,
        literal: tokenizers.Tokenizer,
        template: str,
        special: Mapping[str, str],
    ) -> None:
        self.plain, self.literal, self.template, self.special = plain, literal, template, special
        added = {token.content: (number, token) for number, token in plain.get_added_tokens_decoder().items()}
        self.special_ids = {text: number for text, (number, token) in added.items() if token.special}
        self._cuts = _special_pattern([token for _, token in added.values() if token.special])

    def text(self, messages: Sequence[Mapping[str, Any]], *, generate: bool, **variables: Any) -> str:
        """What the template writes, for those who ask what it can write."""
        return render(self.template, messages, generate=generate, special=self.special, **variables)

    def ids(self, messages: Sequence[Mapping[str, Any]], *, generate: bool, **variables: Any) -> list[int]:
        """The tokens of a conversation; generate: with the opening of the assistant's turn."""
        guarded = self.guard([*messages, variables])
        return self.place(self._render(guarded, len(messages), generate), guarded).ids

    def trained(
        self, messages: Sequence[Mapping[str, Any]], *, answers: Container[int] | None = None, **variables: Any
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens, and the [start, stop) of those that the assistant has to produce in each of its turns: its words and
        the token that ends the turn. answers: numbers of the messages that are asked for; None: all of the assistant's.

        The assistant's stretch of the text is what a generation would have had to write: it begins where the text of
        the messages before, with the opening of a turn, ends, and goes on to where the text of the messages up to this
        one ends. This needs a template whose text only grows from there on; another one is refused. A token that holds
        letters from both sides of the beginning is not trained.
        """
        guarded = self.guard([*messages, variables])
        whole = self._render(guarded, len(messages), False)
        placed = self.place(whole, guarded)
        controls = set(self.special_ids.values())
        turns = []
        for number, message in enumerate(messages):
            if message.get("role") != "assistant" or (answers is not None and number not in answers):
                continue
            before = self._render(guarded, number, True)
            through = self._render(guarded, number + 1, False)
            if not (through.startswith(before) and whole.startswith(through)):
                raise RewritingTemplateError(_not_growing(number, before, through, whole))
            inside = [
                place
                for place, (start, stop) in enumerate(placed.spans)
                if start >= len(before) and stop <= len(through)
            ]
            ends = [place for place in inside if placed.ids[place] in controls]
            last = ends[-1] if ends else inside[-1] if inside else -1
            turns.append((inside[0], last + 1) if inside else (0, 0))
        return placed.ids, turns

    def guard(self, messages: Sequence[Mapping[str, Any]]) -> Guarded:
        """Messages with every special spelling marked, wherever it stands in them."""
        texts = list(_strings(messages))
        if self._cuts is None or not any(spelling in text for spelling in self.special_ids for text in texts):
            return Guarded([dict(message) for message in messages], ())
        free = [mark for mark in NONCHARACTERS if not any(mark in text for text in texts)]
        if len(free) < 2:
            raise HanlinError(
                "The messages hold special tokens' spellings together with nearly all of Unicode's noncharacters "
                "(U+FDD0 to U+FDEF), which no real text does. They are refused."
            )
        left, right = free[:2]
        marks = tuple(self.special_ids)
        longest_first = sorted(marks, key=len, reverse=True)
        found = re.compile("|".join(map(re.escape, longest_first)))

        def mark(value: Any) -> Any:
            if isinstance(value, str):
                return found.sub(lambda match: f"{left}{marks.index(match[0])}{right}", value)
            if isinstance(value, Mapping):
                return {mark(key): mark(inner) for key, inner in value.items()}
            return [mark(inner) for inner in value] if isinstance(value, (list, tuple)) else value

        return Guarded([mark(message) for message in messages], marks, left, right)

    def place(self, text: str, guarded: Guarded) -> Placed:
        """Encode a rendered text: its special tokens as ids, its marks as letters."""
        if not guarded.left or self._cuts is None:
            encoding = self.plain.encode(text, add_special_tokens=False)
            return Placed(encoding.ids, encoding.offsets)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for control in [*self._cuts.finditer(text), None]:
            end = len(text) if control is None else control.start()
            letters, origin = guarded.restore(text[at:end])
            encoding = self.literal.encode(letters, add_special_tokens=False)
            ids += encoding.ids
            spans += [(at + origin[start], at + origin[stop]) for start, stop in encoding.offsets]
            if control is not None:
                ids.append(self.special_ids[control[0].strip() if control[0] not in self.special_ids else control[0]])
                spans.append(control.span())
                at = control.end()
        return Placed(ids, spans)

    def _render(self, guarded: Guarded, count: int, generate: bool) -> str:
        """The first `count` messages; the template's variables stand behind the last one."""
        return self.text(guarded.messages[:count], generate=generate, **guarded.messages[-1])


def _special_pattern(tokens: Sequence[tokenizers.AddedToken]) -> re.Pattern[str] | None:
    """Where a text is cut at special tokens: the longest first, with the white space that some of them swallow."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    parts = [
        (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
        for token in longest_first
    ]
    return re.compile("|".join(parts)) if parts else None


def _strings(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _not_growing(number: int, before: str, through: str, whole: str) -> str:
    expected, found = (before, through) if not through.startswith(before) else (through, whole)
    at = next((place for place, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
    return (
        f"The chat template rewrites what stood before: message {number + 1} (the assistant's) turns "
        f"{expected[max(0, at - 20) : at + 20]!r} into {found[max(0, at - 20) : at + 20]!r} at character {at} of the "
        "text. What the assistant must learn to say cannot be told exactly then. Use a template whose text only grows "
        "with each message (put one in chat_template.jinja), or split the conversation so that each ends with the "
        "answer that is to be learnt and train that one only."
    )
