"""Markdown, cut into stretches but not rewritten.

    read_markdown("see **this**")   ->   <p>  "see "  mark "**"  <strong>  "this"  </strong>  mark "**"  </p>

Every character of the source comes out once and in order, so that each token of a model is somewhere on the page;
what only marks (`**`, `- `, a fence) has the look "mark" and may be hidden. HTML in the source is text like any other,
images are never loaded and links lead to http, https and mailto only: nothing that a model writes can run.

The dialect is what models write (a part of CommonMark and GitHub's tables), with three liberties: a list nests at two
spaces, a line break breaks the line, and emphasis needs no spaces around it, which Chinese does not have.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from hanlin.studio.code_looks import find_code_looks
from hanlin.studio.inline import Item, Stretch, Tag, read_inline, stretch

DEEP = 8  # lists and quotes within each other; deeper ones stay text

FENCE = re.compile(r"(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})[ \t]*(?P<language>[^\s`]*)", re.MULTILINE)
HEADING = re.compile(r"#{1,6}[ \t]+(?=\S)")
RULE = re.compile(r"([-*_])(?:[ \t]*\1){2,}\s*$")
QUOTE = re.compile(r">[ \t]?")
ITEM = re.compile(r"(?:[-*+•]|(?P<number>\d{1,9})[.)])[ \t]+(?=\S)")
DELIMITERS = re.compile(r"\|?(?:\s*:?-+:?\s*\|)+(?:\s*:?-+:?)?\s*$")


class Line(NamedTuple):
    """A line from `start` to `high`, its end included; before `low` stand the marks of its lists and quotes."""

    start: int
    low: int
    high: int


def read_markdown(text: str, begin: int = 0, end: int | None = None, *, code: int = 50_000) -> Iterator[Item]:
    """The tags and stretches of text[begin:end], in order. code: blocks of more characters are not highlighted."""
    yield from _Reader(text, code).read_blocks(list(split_lines(text, begin, len(text) if end is None else end)), 0)


def split_lines(text: str, begin: int, end: int) -> Iterator[Line]:
    while begin < end:
        stop = text.find("\n", begin, end) + 1 or end
        yield Line(begin, begin, stop)
        begin = stop


def find_cuts(text: str, begin: int) -> Iterator[int]:
    """Where a growing text can be cut for good: behind a blank line that no fence, list or quote reaches across."""
    fence = ""
    blank = False
    for line in split_lines(text, begin, len(text)):
        here = text[line.low : line.high]
        if blank and not fence and not here[0].isspace():
            yield line.start
        blank = not here.strip()
        mark = FENCE.match(here.lstrip(" "))
        if fence:
            fence = "" if _closes(here, fence) else fence
        elif mark:
            fence = mark["fence"]


def _closes(line: str, fence: str) -> bool:
    line = line.strip()
    return len(line) >= len(fence) and not line.strip(fence[0])


class _Reader:
    def __init__(self, text: str, code: int) -> None:
        self._text = text
        self._code = code

    def read_blocks(self, lines: Sequence[Line], depth: int) -> Iterator[Item]:
        at = 0
        while at < len(lines):
            here, indent = self._content(lines[at])
            end = at + 1
            if not here:
                yield Stretch(lines[at].start, lines[at].high, "mark")
            elif mark := FENCE.match(here):
                while end < len(lines) and not _closes(self._content(lines[end])[0], mark["fence"]):
                    end += 1
                end = min(end + 1, len(lines))
                yield from self._read_fence(lines[at:end], indent, mark)
            elif mark := HEADING.match(here):
                level = f"h{mark[0].count('#')}"
                yield Tag(f"<{level}>")
                yield from self._read_line(lines[at], indent + mark.end())
                yield Tag(f"</{level}>")
            elif RULE.match(here):
                yield Tag("<hr>")
                yield Stretch(lines[at].start, lines[at].high, "mark")
            elif depth < DEEP and QUOTE.match(here):
                end = self._find_end(lines, end, lambda content: bool(QUOTE.match(content)))
                yield Tag("<blockquote>")
                yield from self.read_blocks([self._strip_quote(line) for line in lines[at:end]], depth + 1)
                yield Tag("</blockquote>")
            elif depth < DEEP and (mark := ITEM.match(here)):
                end = self._find_end_of_list(lines, end, ordered=mark["number"] is not None)
                yield from self._read_list(lines[at:end], depth, mark)
            elif "|" in here and end < len(lines) and DELIMITERS.match(self._content(lines[end])[0]):
                end = self._find_end(lines, end + 1, lambda content: "|" in content)
                yield from self._read_table(lines[at:end])
            else:
                end = self._find_end(lines, end, lambda content: content and not self._begins_block(content, depth))
                yield Tag("<p>")
                for number in range(at, end):
                    yield from self._read_line(lines[number], 0, last=number == end - 1)
                yield Tag("</p>")
            at = end

    def _content(self, line: Line) -> tuple[str, int]:
        """What a line holds without the space around it, and how much stands before."""
        raw = self._text[line.low : line.high]
        return raw.strip(), len(raw) - len(raw.lstrip()) if raw.strip() else 0

    def _find_end(self, lines: Sequence[Line], end: int, belongs: Callable[[str], object]) -> int:
        while end < len(lines) and belongs(self._content(lines[end])[0]):
            end += 1
        return end

    @staticmethod
    def _begins_block(content: str, depth: int) -> bool:
        containers = depth < DEEP and (QUOTE.match(content) or ITEM.match(content))
        return bool(FENCE.match(content) or HEADING.match(content) or RULE.match(content) or containers)

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _read_fence(self, lines: Sequence[Line], indent: int, mark: re.Match[str]) -> Iterator[Item]:
        closed = len(lines) > 1 and _closes(self._content(lines[-1])[0], mark["fence"])
        body = lines[1 : -1 if closed else None]
        language = mark["language"].lower()
        yield Tag(f'<div class="md-fence"><div class="md-head" data-label="{escape(language)}">{COPY_BUTTON}</div>')
        yield Stretch(lines[0].start, lines[0].high, "mark")
        yield Tag("<pre><code>")
        places = [self._skip_spaces(line, indent) for line in body]
        code = "".join(self._text[low : line.high] for low, line in zip(places, body, strict=True))
        looks = find_code_looks(code, language if len(code) <= self._code else "")
        size, look = 0, ""
        for low, line in zip(places, body, strict=True):  # the code's stretches, cut where a line's own marks stand
            yield from stretch(line.start, low, "mark")
            while low < line.high:
                if not size:
                    size, look = next(looks)
                step = min(size, line.high - low)
                yield Stretch(low, low + step, look)
                low, size = low + step, size - step
        yield Tag("</code></pre>")
        if closed:
            yield Stretch(lines[-1].start, lines[-1].high, "mark")
        yield Tag("</div>")

    def _skip_spaces(self, line: Line, most: int) -> int:
        low = line.low
        while low < line.high and low - line.low < most and self._text[low] in " \t":
            low += 1
        return low

    def _strip_quote(self, line: Line) -> Line:
        _, indent = self._content(line)
        mark = QUOTE.match(self._text, line.low + indent)
        return Line(line.start, mark.end() if mark else line.low, line.high)

    def _find_end_of_list(self, lines: Sequence[Line], end: int, *, ordered: bool) -> int:
        """As far as items of this kind, what is indented below them, and text that goes straight on."""
        blank = False
        while end < len(lines):
            content, indent = self._content(lines[end])
            if content and indent < 2:
                item = ITEM.match(content)
                if item and not RULE.match(content):
                    if (item["number"] is not None) != ordered:
                        break
                elif blank or self._begins_block(content, 0):
                    break
            blank = not content
            end += 1
        return end

    def _read_list(self, lines: Sequence[Line], depth: int, first: re.Match[str]) -> Iterator[Item]:
        ordered = first["number"] is not None
        outer = self._content(lines[0])[1]
        heads = [0]
        for number, line in enumerate(lines[1:], 1):
            content, indent = self._content(line)
            if ITEM.match(content) and indent < outer + 2 and not RULE.match(content):
                heads.append(number)
        yield Tag(f'<ol start="{int(first["number"])}">' if ordered else "<ul>")
        for head, stop in zip(heads, [*heads[1:], len(lines)], strict=True):
            line = lines[head]
            _, indent = self._content(line)
            mark = ITEM.match(self._text, line.low + indent)
            low = mark.end() if mark else line.low
            width = low - line.low
            yield Tag("<li>")
            yield Stretch(line.start, low, "mark")
            more = [Line(each.start, self._skip_spaces(each, width), each.high) for each in lines[head + 1 : stop]]
            yield from self.read_blocks([Line(low, low, line.high), *more], depth + 1)
            yield Tag("</li>")
        yield Tag("</ol>" if ordered else "</ul>")

    def _read_table(self, lines: Sequence[Line]) -> Iterator[Item]:
        sides = [cell.strip() for cell in self._content(lines[1])[0].strip("|").split("|")]
        align = [("center" if s[0] == ":" else "right") if s.endswith(":") else "left" for s in sides]
        yield Tag('<div class="md-table"><table><thead>')
        yield from self._read_row(lines[0], align, "th")
        yield Tag(f'</thead><tbody><tr class="md-marks"><td colspan="{len(align)}">')
        yield Stretch(lines[1].start, lines[1].high, "mark")
        yield Tag("</td></tr>")
        for line in lines[2:]:
            yield from self._read_row(line, align, "td")
        yield Tag("</tbody></table></div>")

    def _read_row(self, line: Line, align: Sequence[str], element: str) -> Iterator[Item]:
        """The bars are marks within the cells, since nothing may stand between cells."""
        content, indent = self._content(line)
        low = line.low + indent
        high = low + len(content)
        bars = [low + at for at in _find_bars(content)]
        ends = [bar for bar in bars if bar > low]
        if not ends or ends[-1] != high - 1:
            ends.append(high)
        begin = line.start
        low += content.startswith("|")
        yield Tag("<tr>")
        for column, end in enumerate(ends):
            side = align[column] if column < len(align) else "left"
            yield Tag(f'<{element} class="md-{side}">')
            cell = self._text[low:end]
            left = low + len(cell) - len(cell.lstrip())
            right = max(left, low + len(cell.rstrip()))
            stop = line.high if column == len(ends) - 1 else end
            yield from stretch(begin, left, "mark")
            yield from read_inline(self._text, left, right)
            yield from stretch(right, stop, "mark")
            yield Tag(f"</{element}>")
            begin, low = end, end + 1
        yield Tag("</tr>")

    def _read_line(self, line: Line, skip: int, *, last: bool = True) -> Iterator[Item]:
        """A line of text; its break shows unless it is the last of its block."""
        low = line.low + skip
        high = line.low + len(self._text[line.low : line.high].rstrip())
        yield from stretch(line.start, low, "mark")
        yield from read_inline(self._text, low, high)
        yield from stretch(max(low, high), line.high, "mark" if last else "")


COPY_BUTTON = '<button type="button" class="md-copy"></button>'


def _find_bars(row: str) -> Iterator[int]:
    """Bars that divide cells: neither escaped nor within code."""
    code = escaped = False
    for at, sign in enumerate(row):
        if sign == "|" and not code and not escaped:
            yield at
        code ^= sign == "`"
        escaped = sign == "\\" and not escaped
