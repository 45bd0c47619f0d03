"""Exact answers are counted by group; what is wrong is kept."""

import pytest

from hanlin.core.errors import HanlinError
from hanlin.evaluate.answers import Question, evaluate_answers
from hanlin.evaluate.samples import draw_samples, show_samples

QUESTIONS = [
    Question("1 + 1 =", "2", "sums"),
    Question("2 + 2 =", "4", "sums"),
    Question("法国的首都是哪里？", "我不知道。", "facts"),
]


def parrot(prompts):
    return [{"1 + 1 =": " 2\n", "2 + 2 =": "22"}.get(prompt, "我不知道。") for prompt in prompts]


def test_each_group_has_its_share():
    found = evaluate_answers(QUESTIONS, parrot)
    assert found.by_group() == {"sums": (1, 2), "facts": (1, 1)}
    assert found.accuracy == 2 / 3
    assert [(a.question.prompt, a.given) for a in found.wrong] == [("2 + 2 =", "22")]
    assert found.table().splitlines()[2:] == [
        "| sums | 1 | 2 | 50.0% |",
        "| facts | 1 | 1 | 100.0% |",
        "| all | 2 | 3 | 66.7% |",
    ]


def test_white_space_is_no_mistake_and_anything_else_is():
    for given, right in (("a  b\n c ", True), ("a b C", False), ("ab c", False), ("a b c.", False), ("", False)):
        assert evaluate_answers([Question("?", "a b c")], lambda _, text=given: [text]).accuracy == right


def test_questions_are_asked_a_few_at_a_time_and_in_order():
    asked = []

    def remember(prompts):
        asked.append(len(prompts))
        return parrot(prompts)

    found = evaluate_answers(QUESTIONS, remember, together=2)
    assert asked == [2, 1] and [a.question for a in found.answered] == QUESTIONS


def test_a_generator_that_loses_answers_is_a_bug():
    with pytest.raises(ValueError, match="shorter"):
        evaluate_answers(QUESTIONS, lambda prompts: ["2"])


def test_no_questions_are_refused():
    with pytest.raises(HanlinError, match="no questions"):
        evaluate_answers([], parrot)


def test_samples_keep_prompt_and_lines():
    samples = draw_samples(["Once", "从前"], lambda prompts: [f"{p}…\n\nend" for p in prompts])
    assert [s.prompt for s in samples] == ["Once", "从前"]
    assert show_samples(samples) == "**Once**\n\n> Once…\n>\n> end\n\n**从前**\n\n> 从前…\n>\n> end"
