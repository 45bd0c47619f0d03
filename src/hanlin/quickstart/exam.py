"""The exam: every evaluation question is put to the model alone, greedily, through its chat template."""

from collections.abc import Sequence

from hanlin.core.progress import Progress
from hanlin.engine import Engine, SamplingParams
from hanlin.evaluate.answers import Answers, Question, evaluate_answers
from hanlin.quickstart.instructions import Example
from hanlin.tokens import Tokenizer

SPARE = 4  # tokens that an answer may be longer than the right one, which is enough to be wrong
Grades = dict[str, dict[str, list[int]]]  # {group: {language: [right, asked]}}


def sit_exam(
    engine: Engine, tokenizer: Tokenizer, examples: Sequence[Example], *, title: str = "examine", quiet: bool = False
) -> Answers:
    """Ask everything, questions with answers of like length together."""
    lengths = {example.question: len(tokenizer.encode(example.answer)) + SPARE for example in examples}
    ordered = sorted(examples, key=lambda example: lengths[example.question])
    with Progress(title, total=len(examples), unit="questions", quiet=quiet) as bar:

        def answer(prompts: Sequence[str]) -> list[str]:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            params = [SamplingParams(max_tokens=lengths[prompt], temperature=0.0) for prompt in prompts]
            given = [completion.text for completion in engine.generate(chats, params)]
            bar.advance(len(prompts))
            return given

        return evaluate_answers([Question(e.question, e.answer, f"{e.group}/{e.language}") for e in ordered], answer)


def grades(answers: Answers, order: Sequence[Example]) -> Grades:
    """Right and asked by group and language, groups in the order of the examples."""
    found: Grades = {example.group: {} for example in order}
    for name, pair in answers.by_group().items():
        group, _, language = name.rpartition("/")
        found[group][language] = list(pair)
    return found
