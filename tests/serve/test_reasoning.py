"""Reasoning and content part at the markers, however the text was cut."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanlin.serve.reasoning import ReasoningFormat, ReasoningParser, reasoning_of
from hanlin.tokens import Tokenizer

THINK = ReasoningFormat("<think>", "</think>")
OPENED = ReasoningFormat("<think>", "</think>", opened=True)


def split(form: ReasoningFormat, pieces: list[str]) -> tuple[str, str]:
    parser = ReasoningParser(form)
    parts = [*map(parser.push, pieces), parser.finish()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize(
    ("form", "text", "reasoning", "content"),
    [
        (THINK, "<think>\n想一想, well.\n</think>\n\n你好 world", "想一想, well.", "你好 world"),
        (THINK, "\n<think></think>hi", "", "hi"),
        (THINK, "no thoughts <think>x</think>", "", "no thoughts <think>x</think>"),
        (THINK, "<think>never closed </thin", "never closed </thin", ""),
        (THINK, "<think>a</think>b<think>c</think> \n", "a", "b<think>c</think> \n"),
        (THINK, " <thi", "", " <thi"),
        (THINK, "", "", ""),
        (OPENED, "\n嗯 < 1\n</think>\n答", "嗯 < 1", "答"),
        (OPENED, "x<think>y</think>z", "x<think>y", "z"),
        (OPENED, "<think>again</think>z", "again", "z"),  # some models open once more
        (OPENED, "cut  ", "cut", ""),
    ],
)
def test_the_parts_of_an_answer(form, text, reasoning, content):
    assert split(form, [text]) == (reasoning, content)
    assert split(form, list(text)) == (reasoning, content)


@given(
    parts=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</", "think>", "世", " ", "\n", "ok", "\u3000"]), max_size=12
    ),
    form=st.sampled_from([THINK, OPENED, ReasoningFormat("[THINK]", "[/THINK]")]),
    seed=st.integers(0, 999),
)
def test_cuts_never_matter_and_no_letter_is_lost(parts, form, seed):
    text, rng = "".join(parts), random.Random(seed)
    places = sorted(rng.sample(range(len(text) + 1), rng.randrange(len(text) + 1)))
    whole = split(form, [text])
    assert split(form, [text[a:z] for a, z in itertools.pairwise([0, *places, len(text)])]) == whole
    left = "".join(text.split())
    for marker in (form.opening, form.closing):
        left = left.replace(marker, "", 1) if len("".join(whole)) < len(text) and marker not in "".join(whole) else left
    assert len("".join("".join(whole).split())) >= len(left) - len(form.opening + form.closing)


def test_thinking_says_whether_the_reasoning_is_open():
    parser = ReasoningParser(OPENED)
    assert parser.thinking
    parser.push("a</think>")
    assert not parser.thinking


def test_the_prompt_tells_whether_the_reasoning_is_open():
    tokenizer = Tokenizer.train_from_iterator(["think 想"] * 3, vocab_size=300, special=["<think>", "</think>"])

    def found(prompt: str) -> ReasoningFormat | None:
        return reasoning_of(tokenizer, tokenizer.encode(prompt, special=True))

    assert found("问题<|im_start|>assistant\n") == THINK
    assert found("问题<|im_start|>assistant\n<think>\n") == OPENED
    assert found("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None  # thinking switched off
    plain = Tokenizer.train_from_iterator(["think 想"] * 3, vocab_size=300)
    assert reasoning_of(plain, plain.encode("<think>")) is None
