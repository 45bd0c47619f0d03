"""Streamed pieces joined are the whole text; no piece splits a character or leaks the beginning of a stop string."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hanlin.engine.text import Spelling, TextStream

ALPHABET = st.text("ab狐é🦊", max_size=30)
STOPS = st.lists(st.text("ab狐é🦊", min_size=1, max_size=4), max_size=3)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({min(p, len(data)) for p in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def run(pieces: list[bytes], stops: list[str]) -> list[str]:
    stream, out = TextStream(stops), []
    for piece in pieces:
        out.append(stream.push(piece))
        if stream.stopped:
            return out
    return [*out, stream.finish()]


def before_first_stop(text: str, stops: list[str]) -> str:
    """Brute force: the shortest beginning that ends with a stop string, without the longest such string."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(st.binary(max_size=40), st.lists(st.integers(0, 40)))
def test_any_bytes_in_any_pieces_are_the_whole_text(data, places):
    assert "".join(run(cut(data, places), [])) == data.decode("utf-8", errors="replace")


@given(ALPHABET, st.lists(st.integers(0, 120)), STOPS)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(text, places, stops):
    assert "".join(run(cut(text.encode(), places), stops)) == before_first_stop(text, stops)


@given(ALPHABET, STOPS)
def test_what_was_released_is_never_taken_back_and_nothing_waits_without_need(text, stops):
    stream, released = TextStream(stops), ""
    for end, character in enumerate(text, 1):
        released += stream.push(character.encode())
        if stream.stopped:
            return
        waiting = text[len(released) : end]
        assert released + waiting == text[:end]
        assert not waiting or any(s.startswith(waiting) and s != waiting for s in stops)


@given(st.text("狐🦊é中", min_size=1, max_size=8))
def test_a_piece_never_holds_half_a_character(text):
    stream, pieces = TextStream(), []
    for byte in text.encode():
        pieces.append(stream.push(bytes([byte])))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert stream.finish() == ""


def test_an_unfinished_character_shows_at_the_end():
    stream = TextStream()
    assert stream.push("狐".encode()[:2]) == ""
    assert stream.finish() == "\ufffd"


def test_of_two_stops_that_end_together_the_longer_counts():
    assert "".join(run([b"x", b"ab", b"c"], ["c", "abc"])) == "x"
    assert "".join(run([b"xabc"], ["b", "abc"])) == "xa"  # b was complete first


def test_text_before_min_tokens_is_not_searched():
    stream = TextStream(["ab"])
    assert stream.push(b"ab", watch=False) == "ab"
    assert stream.push(b"a") == ""
    assert stream.push(b"b") == ""
    assert stream.stopped


@given(st.data())
def test_streams_of_tokens_equal_the_tokenizers_text(tokenizer, data):
    spelling = Spelling(tokenizer)
    ids = data.draw(st.lists(st.integers(0, tokenizer.size + 3), max_size=20))  # and ids that no token has
    stream = TextStream()
    text = "".join(stream.push(spelling(i)) for i in ids) + stream.finish()
    assert text == tokenizer.decode([i for i in ids if i < tokenizer.size])
