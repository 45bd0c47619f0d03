"""Answers as HTML: every token a span that can be pointed at, coloured by its probability, with light Markdown.

Nothing of the text is hidden: the marks of Markdown stay, so that each token is there to be looked at and copying gives
exactly what the model wrote.
"""

import html
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from hanlin.engine import TokenLogprob
from hanlin.studio.conversation import Piece
from hanlin.tokens import Tokenizer

SHEET = 1500  # characters
SHADES = (0.9, 0.7, 0.5, 0.3, 0.15, 0.05, 0.01)  # probability at or above the first bound: shade 0, no colour
INLINE = re.compile(r"(?P<code>`[^`\n]+`)|(?P<bold>\*\*[^*\n]+\*\*)|(?P<heading>^#{1,6} [^\n]*)", re.MULTILINE)
FENCE = re.compile(r"^```[^\n]*\n?", re.MULTILINE)

Styled = tuple[int, int, str]  # from, to, class


def shade(probability: float) -> int:
    """0 (certain) to 7 (very unlikely)."""
    return sum(probability < bound for bound in SHADES)


def find_styles(text: str, begin: int = 0, end: int | None = None) -> Iterator[Styled]:
    """Cut a text into stretches, each with its look: '', 'fence', 'code', 'bold' or 'heading'."""
    end = len(text) if end is None else end
    fences = [match.span() for match in FENCE.finditer(text, begin, end)]
    for opening in range(0, len(fences), 2):
        top = fences[opening][0]
        bottom = fences[opening + 1][1] if opening + 1 < len(fences) else end
        yield from _find_inline(text, begin, top)
        yield top, bottom, "fence"
        begin = bottom
    yield from _find_inline(text, begin, end)


def find_sheet_end(text: str, begin: int) -> int | None:
    """Where a growing text can be cut for good: after a line outside of code, once enough stands behind `begin`."""
    if len(text) - begin < SHEET:
        return None
    ends = [text.rfind("\n", low, high) + 1 for low, high, look in find_styles(text, begin) if not look]
    return max((end for end in ends if begin < end < len(text)), default=None)


def _find_inline(text: str, begin: int, end: int) -> Iterator[Styled]:
    for match in INLINE.finditer(text, begin, end):
        if match.start() > begin:
            yield begin, match.start(), ""
        yield match.start(), match.end(), match.lastgroup or ""
        begin = match.end()
    if begin < end:
        yield begin, end, ""


def render_answer(text: str, pieces: Sequence[Piece], *, begin: int = 0, end: int | None = None) -> str:
    """The text, or a part of it, with a span for each piece: `data-i` is the piece's number, `s0` … `s7` its shade."""
    starts = [piece.start for piece in pieces]
    out: list[str] = []
    for low, high, look in find_styles(text, begin, end):
        out.append(f'<span class="md-{look}">' if look else "")
        number = max(bisect_right(starts, low) - 1, 0)
        while low < high and number < len(pieces):
            stop = min(high, starts[number + 1] if number + 1 < len(pieces) else len(text))
            if stop > low:
                spot = f'class="t s{shade(pieces[number].probability)}" data-i="{number}"'
                out.append(f"<span {spot}>{html.escape(text[low:stop])}</span>")
                low = stop
            number += 1
        out.append(html.escape(text[low:high]))  # text without tokens: an answer that was not scored
        out.append("</span>" if look else "")
    return "".join(out)


def render_alternatives(piece: Piece, tokenizer: Tokenizer, note: str) -> str:
    """The card beside a token: its probability and the likeliest alternatives as bars, for each token of the piece."""
    parts = [_render_token(token, tokenizer) for token in piece.tokens]
    return "".join(parts) + f'<div class="card-note">{html.escape(note)}</div>'


def _render_token(token: TokenLogprob, tokenizer: Tokenizer) -> str:
    rows = list(token.top)
    if token.token_id not in dict(rows):
        rows.append((token.token_id, token.logprob))
    lines = []
    for token_id, logprob in rows:
        probability = math.exp(logprob)
        chosen = " chosen" if token_id == token.token_id else ""
        lines.append(
            f'<div class="row{chosen}"><span class="bar" style="width:{100 * probability:.1f}%"></span>'
            f'<span class="name">{html.escape(show_token(tokenizer.token_bytes(token_id)))}</span>'
            f'<span class="share">{format_share(probability)}</span></div>'
        )
    return f'<div class="rows">{"".join(lines)}</div>'


def show_token(raw: bytes) -> str:
    """A token so that one can see it: spaces, line breaks and half characters have signs."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "⟨" + raw.hex(" ").upper() + "⟩"
    for plain, sign in ((" ", "␣"), ("\n", "⏎"), ("\t", "⇥"), ("\r", "␍")):
        text = text.replace(plain, sign)
    return text if text.isprintable() and text else "⟨" + raw.hex(" ").upper() + "⟩"


def format_share(probability: float) -> str:
    """42 %, 3.1 %, 0.02 %, < 0.01 %"""
    percent = 100 * probability
    if percent < 0.01:
        return "< 0.01 %"
    return f"{percent:.{0 if percent >= 99.95 else 1 if percent >= 1 else 2}f} %"
