"""Answers as HTML: Markdown in which every token is a span that can be pointed at, coloured by its probability.

What only marks is there too, in spans that the page hides until the tokens are coloured: then each token must be seen.
"""

import html
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from hanlin.engine import TokenLogprob
from hanlin.studio.answer import Piece
from hanlin.studio.markdown import Stretch, Tag, find_cuts, read_markdown
from hanlin.tokens import Tokenizer

SHEET = 1500  # characters
GROWING_CODE = 4000  # characters of a block that are highlighted again with every token
SHADES = (0.9, 0.7, 0.5, 0.3, 0.15, 0.05, 0.01)  # probability at or above the first bound: shade 0, no colour
CARET = '<span class="hl-caret"></span>'


def shade(probability: float) -> int:
    """0 (certain) to 7 (very unlikely)."""
    return sum(probability < bound for bound in SHADES)


def find_sheet_end(text: str, begin: int) -> int | None:
    """Where a growing text can be cut for good, once enough stands behind `begin`: at the last end of a block."""
    if len(text) - begin < SHEET:
        return None
    return max((cut for cut in find_cuts(text, begin) if cut > begin), default=None)


def render_answer(
    text: str, pieces: Sequence[Piece], *, begin: int = 0, end: int | None = None, growing: bool = False
) -> str:
    """The text, or a part of it, with a span for each piece: `data-i` is the piece's number, `s0` … `s7` its shade.

    growing: with the cursor behind the last character.
    """
    starts = [piece.start for piece in pieces]
    items = list(read_markdown(text, begin, end, **({"code": GROWING_CODE} if growing else {})))
    last = max((n for n, item in enumerate(items) if isinstance(item, Stretch) and item.look != "mark"), default=-1)
    out: list[str] = [CARET] if growing and last < 0 else []
    for number, item in enumerate(items):
        if isinstance(item, Tag):
            out.append(item.markup)
            continue
        out.append(f'<span class="md-{item.look}">' if item.look else "")
        out.extend(_render_tokens(text, item.low, item.high, pieces, starts))
        out.append("</span>" if item.look else "")
        if growing and number == last:
            out.append(CARET)
    return "".join(out)


def _render_tokens(text: str, low: int, high: int, pieces: Sequence[Piece], starts: Sequence[int]) -> Iterator[str]:
    number = max(bisect_right(starts, low) - 1, 0)
    while low < high and number < len(pieces):
        stop = min(high, starts[number + 1] if number + 1 < len(pieces) else len(text))
        if stop > low:
            spot = f'class="t s{shade(pieces[number].probability)}" data-i="{number}"'
            yield f"<span {spot}>{_escape(text[low:stop])}</span>"
            low = stop
        number += 1
    yield _escape(text[low:high])  # text without tokens: an answer that was not scored


def _escape(text: str) -> str:
    return html.escape(text).replace("\0", "\ufffd")  # a browser would drop the character, and its token with it


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
