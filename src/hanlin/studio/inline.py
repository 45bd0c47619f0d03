"""What stands within a line of Markdown: emphasis, code, links. One regular expression, applied to what it encloses."""

import re
from collections.abc import Iterator
from html import escape
from typing import NamedTuple

DEEP = 8  # emphasis within emphasis; deeper stays text

# Bounded everywhere: a line of ten thousand stars costs no more than any other.
INLINE = re.compile(
    r"(?P<code>(?P<ticks>`+)(?!`)(?P<code_text>.{1,2000}?)(?<!`)(?P=ticks)(?!`))"
    r"|(?P<escape>\\(?P<escaped>[!-/:-@\[-`{-~]))"
    r"|(?P<strong>\*\*(?=[^\s*])(?P<strong_text>.{1,1000}?)(?<=\S)\*\*)"
    r"|(?P<strong2>(?<!\w)__(?=\S)(?P<strong2_text>.{1,1000}?)(?<=\S)__(?!\w))"
    r"|(?P<em>\*(?=[^\s*])(?P<em_text>[^*\n]{1,1000}?)(?<=\S)\*(?!\*))"
    r"|(?P<em2>(?<!\w)_(?=[^\s_])(?P<em2_text>[^_\n]{1,1000}?)(?<=\S)_(?!\w))"
    r"|(?P<del>~~(?=\S)(?P<del_text>.{1,1000}?)(?<=\S)~~)"
    r"|(?P<link>!?\[(?P<link_text>[^\[\]\n]{0,1000})\]"
    r"\((?P<target>[^()\s]{1,2000}(?:\([^()\s]{0,200}\)[^()\s]{0,200})?)(?:[ \t]+\"[^\"\n]{0,300}\")?\))"
    r"|(?P<address>https?://[^\s<>\"'`()\[\]，。；！？、（）《》]{1,2000}[^\s<>\"'`()\[\]，。；！？、（）《》.,;:!?*_])"
    r"|(?P<break><br\s{0,3}/?>)"
)
ELEMENTS = {"strong": "strong", "strong2": "strong", "em": "em", "em2": "em", "del": "del"}
SAFE = re.compile(r"(?:https?://|mailto:)", re.IGNORECASE)


KINDS = ("code", "escape", "strong", "strong2", "em", "em2", "del", "link", "address", "break")


class Tag(NamedTuple):
    """Markup that shows no text: of our own words, with escaped attributes."""

    markup: str


class Stretch(NamedTuple):
    """text[low:high], and its look: '', 'mark' or a kind of code (`code_looks`)."""

    low: int
    high: int
    look: str = ""


Item = Tag | Stretch


def stretch(low: int, high: int, look: str = "") -> Iterator[Stretch]:
    """One, or none where there is nothing."""
    if low < high:
        yield Stretch(low, high, look)


def read_inline(text: str, low: int, high: int, depth: int = 0) -> Iterator[Item]:
    """The tags and stretches of text[low:high]."""
    for found in INLINE.finditer(text, low, high):
        yield from stretch(low, found.start())
        low = found.end()
        kind = next(name for name in KINDS if found[name] is not None)
        if kind == "address":
            yield Tag(_open_link(found[0]))
            yield Stretch(*found.span())
            yield Tag("</a>")
        elif kind == "break":
            yield Stretch(*found.span(), "mark")
            yield Tag("<br>")
        elif kind == "escape":
            yield Stretch(found.start(), found.start() + 1, "mark")
            yield Stretch(found.start() + 1, found.end())
        else:
            yield from _read_marked(text, found, kind, depth)
    yield from stretch(low, high)


def _read_marked(text: str, found: re.Match[str], kind: str, depth: int) -> Iterator[Item]:
    """Text between two marks."""
    begin, end = found.span(f"{kind}_text")
    if begin == end:  # a link without a text: leave it as it is
        yield Stretch(*found.span())
        return
    element = ELEMENTS.get(kind, "code" if kind == "code" else "span")
    opening = f"<{element}>"
    if kind == "link" and SAFE.match(found["target"]) and not found[0].startswith("!"):
        element, opening = "a", _open_link(found["target"])
    yield Stretch(found.start(), begin, "mark")
    yield Tag(opening)
    if kind == "code" or depth >= DEEP:
        yield Stretch(begin, end)
    else:
        yield from read_inline(text, begin, end, depth + 1)
    yield Tag(f"</{element}>")
    yield Stretch(end, found.end(), "mark")


def _open_link(target: str) -> str:
    return f'<a href="{escape(target)}" target="_blank" rel="noopener noreferrer nofollow">'
