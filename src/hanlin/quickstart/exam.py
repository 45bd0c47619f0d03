"""Exact answers: each question is put to the model alone, greedily, and its answer must equal the right one to the
letter (runs of blanks count as one blank)."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hanlin.core.progress import Progress
from hanlin.engine import Engine, SamplingParams
from hanlin.quickstart.instructions import Example
from hanlin.tokens import Tokenizer

TOGETHER = 64  # questions handed to the engine at once


@dataclass(frozen=True)
class Answered:
    """A question, the right answer, and what the model said."""

    example: Example
    given: str

    @property
    def right(self) -> bool:
        return same(self.given, self.example.answer)

    def row(self) -> dict[str, Any]:
        return {**asdict(self.example), "given": self.given, "right": self.right}


def sit_exam(
    engine: Engine, tokenizer: Tokenizer, examples: Sequence[Example], *, title: str = "examine", quiet: bool = False
) -> list[Answered]:
    """Ask everything. An answer may be a few tokens longer than the right one, which is enough to be wrong."""
    answered: list[Answered] = []
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].answer))  # equal lengths share a batch
    with Progress(title, total=len(examples), unit="questions", quiet=quiet) as bar:
        for start in range(0, len(order), TOGETHER):
            part = [examples[i] for i in order[start : start + TOGETHER]]
            prompts = [[{"role": "user", "content": example.question}] for example in part]
            lengths = [len(tokenizer.encode(example.answer)) for example in part]
            params = [SamplingParams(max_tokens=length + 4, temperature=0.0) for length in lengths]
            completions = engine.generate(prompts, params)
            answered += [Answered(e, c.text.strip()) for e, c in zip(part, completions, strict=True)]
            bar.advance(len(part), right=sum(a.right for a in answered) / len(answered))
    place = {id(examples[i]): n for n, i in enumerate(order)}
    return [answered[place[id(example)]] for example in examples]


def grades(answered: Iterable[Answered]) -> dict[str, dict[str, list[int]]]:
    """{group: {language: [right, asked]}}, in the order of first appearance."""
    found: dict[str, dict[str, list[int]]] = {}
    for answer in answered:
        pair = found.setdefault(answer.example.group, {}).setdefault(answer.example.language, [0, 0])
        pair[0] += answer.right
        pair[1] += 1
    return found


def same(given: str, right: str) -> bool:
    """Equal up to runs of blanks."""
    return " ".join(given.split()) == " ".join(right.split())
