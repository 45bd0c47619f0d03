"""Instruction data: reproducible, bilingual, right, and without leaks between training and evaluation."""

import ast
import re
from collections.abc import Sequence

import pytest

from hanlin.quickstart.identity import Identity
from hanlin.quickstart.instructions import (
    Example,
    Instructions,
    InstructionSettings,
    language_of,
    make_instructions,
)
from hanlin.quickstart.sums import split_operands
from hanlin.quickstart.unknowable import is_held_out
from hanlin.quickstart.walk import Document, compiled_documents

SMALL = InstructionSettings(
    facts=40, documented=60, expressions=1200, word_expressions=300, word_sums=900, unknowable=400, small_talk=80,
    evaluated=25,
)  # fmt: skip


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return compiled_documents(["builtins", "math", "time", "itertools", "operator", "statistics"])


@pytest.fixture(scope="module")
def made(documents: list[Document]) -> Instructions:
    return make_instructions(documents, SMALL, Identity(), seed=3)


def questions(made: Instructions) -> list[str]:
    return [m["content"] for c in made.conversations for m in c["messages"] if m["role"] == "user"]


def answers(made: Instructions) -> list[str]:
    return [m["content"] for c in made.conversations for m in c["messages"] if m["role"] == "assistant"]


def evaluated(made: Instructions, group: str) -> Sequence[Example]:
    found = [example for example in made.evaluation if example.group.startswith(group)]
    assert found, group
    return found


def test_same_seed_same_data_other_seed_other_data(documents: list[Document], made: Instructions) -> None:
    assert make_instructions(documents, SMALL, Identity(), seed=3) == made
    assert make_instructions(documents, SMALL, Identity(), seed=4).conversations != made.conversations


def test_conversations_are_openai_messages_and_counts_are_true(made: Instructions) -> None:
    for conversation in made.conversations:
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert sum(made.counts.values()) == len(questions(made))
    assert any(len(c["messages"]) > 2 for c in made.conversations)


def test_no_evaluated_question_is_trained_on(made: Instructions) -> None:
    assert not set(questions(made)) & {example.question for example in made.evaluation}


def test_operand_pairs_of_evaluation_stand_in_no_training_question(made: Instructions) -> None:
    """Read the numbers out of the questions themselves, in whatever order, operation, language or story."""
    trained = set()
    for question in questions(made):
        numbers = [int(n) for n in re.findall(r"(?<![\w.])\d+(?![\w.]*\()", question)]
        if len(numbers) == 2:
            trained.add(tuple(sorted(numbers)))
    for group in ("expressions", "word sums"):
        for example in evaluated(made, group):
            pair = tuple(sorted(int(n) for n in re.findall(r"\d+", example.question)))
            assert len(pair) == 2
            assert pair not in trained, example
    assert len(trained) > 150


def test_words_of_evaluation_stand_in_no_training_question(made: Instructions) -> None:
    trained = {word for question in questions(made) for word in re.findall(r"'(\w+)'", question)}
    unseen = {re.findall(r"'(\w+)'", e.question)[0] for e in evaluated(made, "word expressions")}
    assert unseen
    assert not unseen & trained


def test_functions_never_asked_about_stand_in_no_question(made: Instructions) -> None:
    for example in evaluated(made, "never asked about"):
        name = re.compile(rf"(?<![\w.]){re.escape(example.key)}(?![\w.]*\w)")
        assert not any(name.search(question) for question in questions(made)), example.key


def test_unseen_wordings_ask_about_trained_facts(made: Instructions) -> None:
    asked = questions(made)
    for example in evaluated(made, "facts"):
        assert any(example.key in question for question in asked)
        assert example.question not in asked


def test_expressions_have_the_value_that_python_gives(made: Instructions) -> None:
    checked = 0
    for conversation in made.conversations:
        turns = conversation["messages"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            code = re.fullmatch(r"(?:Compute|计算) (.+)[.。]", question["content"])
            if code:
                assert answer["content"] == repr(eval(compile(ast.parse(code[1], mode="eval"), "", "eval")))
                checked += 1
    assert checked > 20


def test_word_sums_are_right(made: Instructions) -> None:
    minus = ("gives away", "took", "lost", "fewer", "送给", "拿走", "丢了", "少")
    for example in evaluated(made, "word sums"):
        a, b = (int(n) for n in re.findall(r"\d+", example.question))
        less = any(word in example.question.replace("多少", "") for word in minus)
        assert example.answer == str(a - b if less else a + b), example


def test_both_languages_in_every_group(made: Instructions) -> None:
    groups = {(e.group, e.language) for e in made.evaluation}
    for group, _ in list(groups):
        assert (group, "en") in groups
        assert (group, "zh") in groups
    assert any("你好" in question for question in questions(made))
    assert any("我不知道" in answer for answer in answers(made))


def test_what_it_cannot_know_is_asked_about_other_things(made: Instructions) -> None:
    assert is_held_out("France/法国")
    text = "\n".join(questions(made))
    assert "France" not in text
    assert "法国" not in text
    for example in evaluated(made, "unknowable"):
        assert example.answer == Identity().dont_know(example.language)


def test_operand_split_is_complete_and_disjoint() -> None:
    split = split_operands(9, 0.1, seed=0)
    assert len(split.trained) + len(split.unseen) == 55
    assert not set(split.trained) & set(split.unseen)
    assert not set(split.trained_words) & set(split.unseen_words)


def test_own_text_gives_title_and_continuation_questions() -> None:
    sentences = [f"The {w} stood at the end of the long road to the sea." for w in "abcdefghijklmnopqrstuvwxyz"]
    chinese = "第{}回写的是园中众人赏花作诗的一段故事，十分热闹。"
    documents = [Document(f"Part {s[4]}", "passage", f"Part {s[4]}", s, "x") for s in sentences]
    documents += [Document(f"第{n}回", "passage", f"第{n}回", chinese.format(n), "x") for n in "一二三四五六七八九十"]
    identity = Identity("the text of story.txt", "story.txt 的文本")
    made = make_instructions(documents, SMALL, identity, seed=0, own_text=True)
    groups = set(made.counts)
    assert {"passages (en)", "passages (zh)", "continuations (en)", "expressions (zh)"} <= groups
    assert not any("json.dumps" in question for question in questions(made))
    assert any("story.txt" in answer for answer in answers(made))
    for example in evaluated(made, "never asked about"):
        assert not any(example.key == q or f" {example.key}" in q for q in questions(made))


def test_language_is_told_by_the_letters() -> None:
    assert language_of("What is len?") == "en"
    assert language_of("len 是什么？") == "zh"
