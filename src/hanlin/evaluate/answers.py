"""Exact answers: how many questions a model answers to the letter, by group, and which it does not."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hanlin.core.errors import HanlinError

Generate = Callable[[Sequence[str]], Sequence[str]]  # prompts -> what the model says to each


@dataclass(frozen=True)
class Question:
    """group: the row of the table that it counts in, such as "facts, Chinese"."""

    prompt: str
    answer: str
    group: str = "all"


@dataclass(frozen=True)
class Answered:
    question: Question
    given: str

    @property
    def right(self) -> bool:
        """Equal to the letter, but for runs of white space and what stands around the whole."""
        return self.given.split() == self.question.answer.split()


@dataclass(frozen=True)
class Answers:
    """Every question with what was said to it, in the order asked."""

    answered: tuple[Answered, ...]

    @property
    def accuracy(self) -> float:
        return sum(a.right for a in self.answered) / len(self.answered)

    @property
    def wrong(self) -> list[Answered]:
        return [a for a in self.answered if not a.right]

    def by_group(self) -> dict[str, tuple[int, int]]:
        """{group: (right, asked)} in order of first appearance."""
        asked = Counter(a.question.group for a in self.answered)
        right = Counter(a.question.group for a in self.answered if a.right)
        return {group: (right[group], count) for group, count in asked.items()}

    def table(self) -> str:
        """Markdown: a row a group and, of several, one for all."""
        groups = self.by_group()
        if len(groups) > 1:
            groups["all"] = (sum(a.right for a in self.answered), len(self.answered))
        rows = [f"| {name} | {right} | {asked} | {right / asked:.1%} |" for name, (right, asked) in groups.items()]
        return "\n".join(["| questions | right | asked | share |", "| --- | ---: | ---: | ---: |", *rows])


def evaluate_answers(questions: Sequence[Question], generate: Generate, *, together: int = 64) -> Answers:
    """Ask everything, `together` prompts at a time. `generate` decides how (greedily, through which chat template)."""
    if not questions:
        raise HanlinError("There are no questions to ask.")
    answered: list[Answered] = []
    for start in range(0, len(questions), together):
        part = questions[start : start + together]
        given = generate([question.prompt for question in part])
        answered += [Answered(question, text) for question, text in zip(part, given, strict=True)]
    return Answers(tuple(answered))
