"""Reasoning problems made by a program, with answers that a program can check: what on-policy methods need and no file
has.

    sum      What is 37 + 48?                                        85
    chain    Compute 12 + 30 - 7.      <think>12 + 30 = 42; 42 - 7 = 35</think> 35
    story    Tom has 12 apples, buys 30 more and gives away 7. How many are left?

What is held out is decided by the operands, never by the wording: a pair of numbers that stands in a held-out problem
stands in no training problem, in any order, operation, language or story. Worked solutions (`reasoning`) are for the
cold start of a reasoning model (DeepSeek-R1, arXiv:2501.12948, section 2.3)."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hanlin.core.errors import HanlinError
from hanlin.core.files import write_text
from hanlin.core.seeds import derive

OPEN, CLOSE = "<think>", "</think>"
TRIES = 1000  # draws in a row that miss before it is believed that there is nothing to find
ASK = {
    "en": ("What is {}?", "Compute {}.", "How much is {}?", "Please work out {}."),
    "zh": ("{} 等于几？", "请计算 {}。", "{} 是多少？", "算一算：{}。"),
}
STORIES = {
    "en": ("{n} has {a} {i}{steps}. How many {i} are there now?", ", gets {} more", ", gives away {}"),
    "zh": ("{n}有{a}个{i}{steps}。现在有多少个{i}？", "，又得到{}个", "，送出{}个"),
}
PEOPLE = {"en": ("Tom", "Anna", "Ben", "Mary", "Sam"), "zh": ("小明", "小红", "小华", "丽丽")}
ITEMS = {"en": ("apples", "books", "cards", "coins"), "zh": ("苹果", "球", "鸡蛋", "杯子")}


@dataclass(frozen=True)
class Problem:
    """prompt and answer; reasoning: the steps that lead there; language: en or zh."""

    prompt: str
    answer: str
    reasoning: str
    language: str

    @property
    def worked(self) -> str:
        """The answer of a model that thinks first."""
        return f"{OPEN}{self.reasoning}{CLOSE} {self.answer}"


def make_problems(
    kind: str, count: int, *, largest: int, terms: int = 3, held_out: bool = False, share: float = 0.1, seed: int = 0
) -> list[Problem]:
    """`count` problems, half in each language, without repeats while there are others.

    largest: of the numbers that are asked about; terms: how many of them in a chain or story; share: of the pairs of
    numbers that are held out, which decides what `held_out` may use.
    """
    if kind not in KINDS:
        raise HanlinError(f"There are no problems of the kind {kind!r}; there are {', '.join(KINDS)}.")
    if largest < 3 or terms < 2 or not 0 < share < 1:
        raise HanlinError(
            f"largest is {largest}, terms {terms}, share {share}: at least 3, at least 2, between 0 and 1 are needed."
        )
    chance = random.Random(derive(seed, "problems", kind, "held out" if held_out else "trained"))
    found: dict[str, Problem] = {}
    for language in ("en", "zh"):
        wanted = len(found) + (count + (language == "en")) // 2
        known = 0  # draws in a row that were there already
        for problem in _draw(kind, language, chance, largest, terms, held_out, share, seed):
            known = known + 1 if problem.prompt in found else 0
            found.setdefault(problem.prompt, problem)
            if len(found) == wanted or known == TRIES:
                break
    if not found:
        raise HanlinError(
            f"No {'held-out' if held_out else 'training'} problem of the kind {kind} has numbers up to {largest}. "
            "Give a larger `largest`."
        )
    problems = list(found.values())
    chance.shuffle(problems)
    return problems


def is_held_out(a: int, b: int, *, share: float, seed: int) -> bool:
    """Whether this pair of numbers, in either order, is kept for evaluation: a hash decides."""
    return derive(seed, "pair", min(a, b), max(a, b)) < share * 2**63


def write_problems(
    out: Path,
    kind: str,
    *,
    train: int,
    held_out: int,
    largest: int,
    terms: int = 3,
    worked: int = 0,
    answered: int = 0,
    seed: int = 0,
) -> dict[str, int]:
    """`train.jsonl` and `held-out.jsonl` (prompt, answer), and of the training problems conversations for `objective:
    sft`: `worked.jsonl` with `worked` solutions, `answered.jsonl` with `answered` bare answers. Returns how many stand
    in each file."""
    files = {
        "train.jsonl": make_problems(kind, train, largest=largest, terms=terms, seed=seed),
        "held-out.jsonl": make_problems(kind, held_out, largest=largest, terms=terms, held_out=True, seed=seed),
    }
    counts = {}
    for name, problems in files.items():
        write_text(out / name, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in problems))
        counts[name] = len(problems)
    for name, wanted in (("worked", worked), ("answered", answered)):
        if wanted:
            rows = [
                [
                    {"role": "user", "content": p.prompt},
                    {"role": "assistant", "content": p.worked if name == "worked" else p.answer},
                ]
                for p in files["train.jsonl"][:wanted]
            ]
            lines = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
            write_text(out / f"{name}.jsonl", "".join(lines))
            counts[f"{name}.jsonl"] = len(rows)
    return counts


def _draw(
    kind: str, language: str, chance: random.Random, largest: int, terms: int, held_out: bool, share: float, seed: int
) -> Iterator[Problem]:
    """Problems whose neighbouring numbers are all of the wanted side of the split: endless, unless hardly any exist."""
    count, misses = 2 if kind == "sum" else terms, 0
    while misses < TRIES:
        misses += 1
        numbers = [chance.randint(0, largest)]
        while len(numbers) < count:
            following = (chance.randint(0, largest) for _ in range(TRIES // 10))
            fitting = (n for n in following if is_held_out(numbers[-1], n, share=share, seed=seed) == held_out)
            if (number := next(fitting, None)) is None:
                break
            numbers.append(number)
        if len(numbers) < count:
            continue
        signs = [chance.choice("+-") for _ in numbers[1:]]
        total, steps = numbers[0], []
        for sign, number in zip(signs, numbers[1:], strict=True):
            after = total + number if sign == "+" else total - number
            steps.append(f"{total} {sign} {number} = {after}")
            total = after
            if total < 0:
                break
        if total < 0:
            continue
        misses = 0
        yield Problem(KINDS[kind](language, numbers, signs, chance), str(total), "; ".join(steps), language)


def _expression(language: str, numbers: list[int], signs: list[str], chance: random.Random) -> str:
    written = str(numbers[0]) + "".join(f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))
    return chance.choice(ASK[language]).format(written)


def _story(language: str, numbers: list[int], signs: list[str], chance: random.Random) -> str:
    frame, more, less = STORIES[language]
    steps = "".join((more if s == "+" else less).format(n) for s, n in zip(signs, numbers[1:], strict=True))
    person, item = chance.choice(PEOPLE[language]), chance.choice(ITEMS[language])
    return frame.format(n=person, a=numbers[0], i=item, steps=steps)


KINDS: dict[str, Callable[[str, list[int], list[str], random.Random], str]] = {
    "sum": _expression,
    "chain": _expression,
    "story": _story,
}
