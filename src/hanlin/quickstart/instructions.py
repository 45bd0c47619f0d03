"""Instruction data by program, from the same text: questions and answers that can be checked to the letter.

    facts        what newcomers ask first, in many wordings        -> evaluation: the same facts, unseen wordings
    documented   other functions of the text, asked about once     -> evaluation: functions that no question is about
    passages     the user's own files: titles and continuations    -> evaluation: passages that no question is about
    expressions  one operation on small numbers, or on a word      -> evaluation: operands never trained on
    word sums    the same in little stories                        -> evaluation: operands never trained on
    unknowable   "I don't know"                                    -> evaluation: other things, other wordings
    small talk   greetings, who are you

Every group is in English and in Chinese; some conversations have several turns. The result is a function of the
documents, the settings and the seed.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

from pydantic import Field

from hanlin.core.recipe import Section
from hanlin.core.seeds import derive
from hanlin.quickstart.facts import NAMES, Fact, fact_of, newcomers_facts
from hanlin.quickstart.identity import Identity, small_talk
from hanlin.quickstart.questions import CALL, CONTINUE, PASSAGE, WHAT, Language, Wordings
from hanlin.quickstart.sums import expressions, split_operands, word_expressions, word_sums
from hanlin.quickstart.unknowable import unknowable
from hanlin.quickstart.walk import Document

LANGUAGES: tuple[Language, ...] = ("en", "zh")
HALF_LIMIT = 120  # characters of either half of a sentence to be continued


class InstructionSettings(Section):
    """How many examples of each group. Counts are for both languages together."""

    facts: Annotated[int, Field(ge=0, description="facts that newcomers ask first, or passages of your own text")] = 300
    wordings: Annotated[int, Field(gt=0, description="wordings of a `what` question for each fact and language")] = 12
    documented: Annotated[int, Field(ge=0, description="further functions, each asked about once")] = 1500
    expressions: Annotated[int, Field(ge=0)] = 4000
    word_expressions: Annotated[int, Field(ge=0)] = 800
    word_sums: Annotated[int, Field(ge=0)] = 3000
    unknowable: Annotated[int, Field(ge=0)] = 1600
    small_talk: Annotated[int, Field(ge=0)] = 600
    several_turns: Annotated[float, Field(ge=0, le=1, description="share of conversations with two or three turns")] = (
        0.1
    )
    largest_operand: Annotated[int, Field(ge=4, description="with 9, so only one digit, unseen pairs did worse")] = 20
    held_out_pairs: Annotated[float, Field(gt=0, lt=1, description="share of operand pairs kept for evaluation")] = 0.1
    evaluated: Annotated[int, Field(gt=0, description="questions of each group and language in evaluation")] = 50


@dataclass(frozen=True)
class Example:
    """One question with its answer. key: what may not be in both training and evaluation ("": the wording decides)."""

    group: str
    language: Language
    question: str
    answer: str
    key: str = ""


@dataclass(frozen=True)
class Instructions:
    """conversations: OpenAI messages with their groups, for training; evaluation: single questions."""

    conversations: list[dict[str, Any]]
    evaluation: list[Example]
    counts: dict[str, int]


def make_instructions(
    documents: Sequence[Document],
    settings: InstructionSettings,
    identity: Identity,
    *,
    seed: int,
    own_text: bool = False,
) -> Instructions:
    """Training conversations and evaluation questions from the training documents.

    own_text: the documents are passages of the user's files rather than Python documentation.
    """
    trained: list[Example] = []
    asked: list[Example] = []
    for some, evaluated in (
        _passages(documents, settings, seed) if own_text else _documentation(documents, settings, seed),
        _sums(settings, seed),
        _unknowable(documents, settings, identity, seed),
    ):
        trained += some
        asked += evaluated
    for language in LANGUAGES:
        talk = small_talk(identity, language)
        times = settings.small_talk // 2
        trained += [Example("small talk", language, *talk[i % len(talk)]) for i in range(times)]
    questions = {example.question for example in trained}
    asked = [example for example in asked if example.question not in questions]
    random.Random(derive(seed, "order")).shuffle(trained)
    counts: dict[str, int] = {}
    for example in trained:
        label = f"{example.group} ({example.language})"
        counts[label] = counts.get(label, 0) + 1
    return Instructions(_conversations(trained, settings.several_turns, seed), asked, dict(sorted(counts.items())))


def answer_of(fact: Fact, language: Language) -> str:
    """`len(obj, /): Return the number of items in a container.`; in Chinese only the frame is Chinese."""
    if fact.kind == "passage":
        return fact.sentence
    return f"{fact.signature}: {fact.sentence}" if language == "en" else f"{fact.signature}，作用：{fact.sentence}"


def _documentation(
    documents: Sequence[Document], settings: InstructionSettings, seed: int
) -> tuple[list[Example], list[Example]]:
    facts = newcomers_facts(documents, limit=settings.facts)
    chance = random.Random(derive(seed, "facts"))
    trained, asked = [], []
    for language in LANGUAGES:
        what, call = _wordings(WHAT, language), _wordings(CALL, language)
        for fact in facts:
            templates = list(islice(what.trained, settings.wordings))
            trained += [_about(fact, "facts", language, t) for t in templates]
            if "(" in fact.signature:
                calls = chance.sample(call.trained, max(1, min(len(call.trained), settings.wordings // 3)))
                trained += [_call(fact, language, t) for t in calls]
        for fact in chance.sample(facts, min(settings.evaluated, len(facts))):
            asked.append(_about(fact, "facts, unseen wording", language, chance.choice(what.unseen)))
    others = _others(documents)
    chance.shuffle(others)
    evaluated = others[: settings.evaluated]
    for place, fact in enumerate(others[settings.evaluated : settings.evaluated + settings.documented]):
        language = LANGUAGES[place % 2]
        trained.append(_about(fact, "documented", language, chance.choice(_wordings(WHAT, language).trained)))
    for language in LANGUAGES:
        wording = _wordings(WHAT, language)
        asked += [_about(f, "never asked about", language, chance.choice(wording.trained)) for f in evaluated]
    return trained, asked


def _others(documents: Sequence[Document]) -> list[Fact]:
    """Public functions and classes of the standard library, numpy and torch that are not among the newcomers' facts."""
    known = set(NAMES)
    found = []
    for document in documents:
        parts = document.name.split(".")
        public = not any(part.startswith("_") for part in parts)
        if public and len(parts) <= 3 and document.kind in ("function", "class") and document.name not in known:
            fact = fact_of(document)
            if fact is not None:
                found.append(fact)
    return found


def _passages(
    documents: Sequence[Document], settings: InstructionSettings, seed: int
) -> tuple[list[Example], list[Example]]:
    chance = random.Random(derive(seed, "passages"))
    usable = [fact for fact in map(fact_of, documents) if fact is not None]
    usable = list({fact.name: fact for fact in usable}.values())
    chance.shuffle(usable)
    unasked = usable[: min(settings.evaluated, len(usable) // 10)]
    facts = usable[len(unasked) :][: settings.facts]
    trained, asked = [], []
    for fact in facts:
        language = language_of(fact.sentence)
        wording = _wordings(PASSAGE, language)
        trained += [_about(fact, "passages", language, t) for t in wording.trained]
        half = _halves(fact.sentence)
        if half:
            templates = _wordings(CONTINUE, language).trained
            trained += [Example("continuations", language, t.format(half[0]), half[1], fact.name) for t in templates]
    for fact in facts[: settings.evaluated]:
        language = language_of(fact.sentence)
        template = chance.choice(_wordings(PASSAGE, language).unseen)
        asked.append(_about(fact, "passages, unseen wording", language, template))
    for fact in unasked:
        language = language_of(fact.sentence)
        asked.append(_about(fact, "never asked about", language, chance.choice(_wordings(PASSAGE, language).trained)))
    return trained, asked


def _sums(settings: InstructionSettings, seed: int) -> tuple[list[Example], list[Example]]:
    split = split_operands(settings.largest_operand, settings.held_out_pairs, seed)
    trained, asked = [], []
    for language in LANGUAGES:
        chance = random.Random(derive(seed, "sums", language))
        for group, count, seen, unseen in (
            (
                "expressions",
                settings.expressions,
                expressions(split.trained, language, chance, unseen=False),
                expressions(split.unseen, language, chance, unseen=False),
            ),
            (
                "word expressions",
                settings.word_expressions,
                word_expressions(split.trained_words, language, chance, unseen=False),
                word_expressions(split.unseen_words, language, chance, unseen=False),
            ),
            (
                "word sums",
                settings.word_sums,
                word_sums(split.trained, language, chance),
                word_sums(split.unseen, language, chance),
            ),
        ):
            if count:
                trained += [Example(group, language, s.question, s.answer, s.key) for s in islice(seen, count // 2)]
                asked += _distinct(
                    (Example(f"{group}, unseen operands", language, s.question, s.answer, s.key) for s in unseen),
                    settings.evaluated,
                )
    return trained, asked


def _unknowable(
    documents: Sequence[Document], settings: InstructionSettings, identity: Identity, seed: int
) -> tuple[list[Example], list[Example]]:
    real = {document.name for document in documents}
    trained, asked = [], []
    for language in LANGUAGES:
        chance = random.Random(derive(seed, "unknowable", language))
        answer = identity.dont_know(language)
        seen = unknowable(language, chance, unseen=False, real=real)
        trained += [Example("unknowable", language, q, answer) for q in islice(seen, settings.unknowable // 2)]
        fresh = unknowable(language, chance, unseen=True, real=real)
        asked += _distinct((Example("unknowable, unseen", language, q, answer) for q in fresh), settings.evaluated)
    return trained, asked


def language_of(text: str) -> Language:
    """Chinese where at least a tenth of the letters are Chinese characters."""
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in text)
    return "zh" if chinese * 10 >= max(1, sum(c.isalpha() for c in text)) else "en"


def _about(fact: Fact, group: str, language: Language, template: str) -> Example:
    return Example(group, language, template.format(fact.name), answer_of(fact, language), fact.name)


def _call(fact: Fact, language: Language, template: str) -> Example:
    return Example("facts", language, template.format(fact.name), fact.signature, fact.name)


def _wordings(choices: tuple[Wordings, ...], language: Language) -> Wordings:
    return next(wording for wording in choices if wording.language == language)


def _halves(sentence: str) -> tuple[str, str] | None:
    """A sentence cut near its middle, between words (Chinese: between characters)."""
    middle = len(sentence) // 2
    if language_of(sentence) == "en":
        middle = sentence.find(" ", middle)
    if middle < 8 or len(sentence) - middle < 4 or max(middle, len(sentence) - middle) > HALF_LIMIT:
        return None
    return sentence[:middle], sentence[middle:].strip()


def _distinct(examples: Iterator[Example], count: int) -> list[Example]:
    """The first `count` examples with different questions; fewer where the source repeats itself."""
    found: dict[str, Example] = {}
    for example in islice(examples, 20 * count):
        found.setdefault(example.question, example)
        if len(found) == count:
            break
    return list(found.values())


def _conversations(examples: Sequence[Example], several: float, seed: int) -> list[dict[str, Any]]:
    """Single questions, and `several` of the conversations with two or three turns, all within one language."""
    chance = random.Random(derive(seed, "turns"))
    conversations = []
    for language in LANGUAGES:
        rest = [example for example in examples if example.language == language]
        place = 0
        while place < len(rest):
            turns = chance.choice((2, 3)) if chance.random() < several else 1
            part = rest[place : place + turns]
            place += turns
            messages = []
            for example in part:
                messages.append({"role": "user", "content": example.question})
                messages.append({"role": "assistant", "content": example.answer})
            conversations.append(
                {"messages": messages, "groups": sorted({e.group for e in part}), "language": language}
            )
    chance.shuffle(conversations)
    return conversations
