"""Answers as HTML: nothing of the text is lost, markup is text, every token can be pointed at."""

import html
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.tiny import TEXT
from tests.studio.answers import answered

from hanlin.engine import TokenLogprob
from hanlin.studio.answer import Piece, TooLongError, fit
from hanlin.studio.rendering import find_sheet_end, format_share, render_alternatives, render_answer, shade, show_token
from hanlin.studio.words import WORDS, choose, preferred_language, say
from hanlin.tokens import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator([TEXT] * 4, vocab_size=420)


def plain(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


marked = st.text(alphabet="ab `*#\n<&龘翰\"'", max_size=60)


@given(text=marked, step=st.integers(1, 4))
def test_rendering_loses_and_adds_nothing(tokenizer, text, step):
    answer = answered(tokenizer, text, step=step)
    assert answer.text == text
    markup = render_answer(text, answer.pieces)
    assert plain(markup) == text
    assert markup.count("<span") == markup.count("</span>")


@given(text=marked)
def test_every_token_is_in_exactly_one_piece(tokenizer, text):
    answer = answered(tokenizer, text)
    ids = [token.token_id for piece in answer.pieces for token in piece.tokens]
    assert ids == tokenizer.encode(text)
    numbers = [int(number) for number in re.findall(r'data-i="(\d+)"', render_answer(text, answer.pieces))]
    assert sorted(set(numbers)) == list(range(len(answer.pieces))) and numbers == sorted(numbers)


def test_a_character_of_several_tokens_is_one_piece(tokenizer):
    assert len(tokenizer.encode("龘")) > 1
    answer = answered(tokenizer, "a龘b")
    assert [len(piece.tokens) for piece in answer.pieces] == [1, len(tokenizer.encode("龘")), 1]
    assert math.isclose(answer.pieces[1].probability, 0.5 ** len(tokenizer.encode("龘")))


@settings(deadline=None, max_examples=30)
@given(text=st.text(alphabet="ab\n`", min_size=100, max_size=400).map(lambda text: text * 10))
def test_sheets_join_to_the_whole(tokenizer, text):
    answer = answered(tokenizer, text, step=10**6)
    begin, sheets = 0, []
    while (end := find_sheet_end(text, begin)) is not None:
        assert text[end - 1] == "\n" and end > begin
        sheets.append(render_answer(text, answer.pieces, begin=begin, end=end))
        begin = end
    sheets.append(render_answer(text, answer.pieces, begin=begin))
    assert plain("".join(sheets)) == text


def test_a_character_that_html_cannot_hold_is_still_there_to_point_at(tokenizer):
    assert plain(render_answer("a\0b", answered(tokenizer, "a\0b").pieces)) == "a\ufffdb"


def test_the_cursor_stands_behind_the_last_character_while_the_answer_grows(tokenizer):
    for text in ("", "one", "a **b**", "- x\n- y", "```py\nx = 1"):
        answer = answered(tokenizer, text)
        markup = render_answer(text, answer.pieces, growing=True)
        assert markup.count("hl-caret") == 1 and plain(markup.split('<span class="hl-caret">')[1]).strip("*`\n") == ""
        assert "hl-caret" not in render_answer(text, answer.pieces)


def test_shades_and_shares():
    shades = [shade(p) for p in (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.02, 0.001)]
    assert shades == [0, 0, 1, 2, 3, 4, 5, 6, 7]
    shares = [format_share(p) for p in (1.0, 0.423, 0.0312, 0.0002, 1e-7)]
    assert shares == ["100 %", "42.3 %", "3.1 %", "0.02 %", "< 0.01 %"]
    tokens = [show_token(raw) for raw in (b" a", b"\n", "翰".encode(), "翰".encode()[:2], b"")]
    assert tokens == ["␣a", "⏎", "翰", "⟨E7 BF⟩", "⟨⟩"]


def test_alternatives_show_the_chosen_even_where_it_is_not_among_the_best(tokenizer):
    token, other = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    piece = Piece(0, [TokenLogprob(token, math.log(0.001), ((other, math.log(0.9)),))])
    card = render_alternatives(piece, tokenizer, "note <b>")
    assert card.count('class="row') - card.count('class="rows') == 2
    assert card.count("chosen") == 1 and "0.10 %" in card and "90.0 %" in card and "note &lt;b&gt;" in card


def test_the_prompt_keeps_as_much_history_as_leaves_room(tokenizer):
    system = [{"role": "system", "content": "Be brief."}]
    messages = [*system]
    for number in range(6):
        messages.append({"role": "user", "content": f"question {number}"})
        messages.append({"role": "assistant", "content": "狗并不在意" * 3})
    messages.append({"role": "user", "content": "the last"})

    def prompt(context, limit=20):
        return fit(messages, chat=tokenizer.chat, context=context, max_tokens=limit)

    whole = prompt(4096)
    assert not whole.forgot and whole.max_tokens == 20
    text = tokenizer.decode(whole.ids)
    assert "question 0" in text and "Be brief." in text
    tight = prompt(len(whole.ids))
    text = tokenizer.decode(tight.ids)
    assert tight.forgot and "question 0" not in text and "question 5" in text and "Be brief." in text
    assert len(tight.ids) + tight.max_tokens <= len(whole.ids) and tight.max_tokens == 20
    alone = len(fit([*system, messages[-1]], chat=tokenizer.chat, context=4096, max_tokens=1).ids)
    assert prompt(alone + 1).max_tokens == 1
    with pytest.raises(TooLongError) as error:
        prompt(alone)
    assert error.value.needed == alone + 1


def test_words_exist_in_both_languages_with_the_same_places():
    for key, texts in WORDS.items():
        assert set(texts) == {"en", "zh"} and all(texts.values()), key
        assert len({frozenset(re.findall(r"\{(\w+)\}", text)) for text in texts.values()}) == 1, key
    assert say("tokens", "zh", n=3) == "3 个词元"
    assert choose({"en": "a", "zh": "b"}, "zh") == "b" and choose("c", "zh") == "c" and choose({"en": "a"}, "zh") == "a"


def test_the_language_is_the_browsers_first_that_is_spoken_here():
    headers = {"zh-CN,zh;q=0.9,en;q=0.8": "zh", "en-US,en;q=0.9,zh;q=0.5": "en", "fr,zh-TW;q=0.5": "zh", "": "en"}
    for header, language in headers.items():
        assert preferred_language(header) == language
    assert preferred_language(None) == "en"
