"""Small Python expressions and word sums, with their value computed.

What may be asked in evaluation is decided by the *operands*, not by the wording: an unordered pair of numbers (or a
word) belongs to training or to evaluation, in every operation, order, language and story alike. A split by wording
would leak: the model would have seen 3 + 5 and be asked it again in other words.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from hanlin.core.seeds import derive
from hanlin.quickstart.questions import VALUE, Language

OPERATIONS = ("{a} + {b}", "{a} - {b}", "{a} < {b}", "{a} > {b}", "{a} == {b}", "max({a}, {b})", "min({a}, {b})")
LIKELY = (6, 6, 1, 1, 1, 1, 1)  # how often each is asked
WORD_OPERATIONS = ("len('{w}')", "'{w}'.upper()", "'{w}'[0]", "'{w}'[-1]", "'{w}' * 2", "'{w}' + '!'")
WORDS = """
cat dog tree house book moon star fish bird apple river stone cloud light green blue red gold rain snow hand
milk bread door ship lake leaf king song road time word game ball frog bear lion wolf corn rice cake lamp
desk wind fire rose seed wood salt tea pen cup hat box map key bus car egg sun sea ice
"""
STORIES_EN = (
    ("{n} has {a} {i} and gets {b} more. How many {i} does {p} have?", "+"),
    ("{n} has {a} {i}. {n} buys {b} more. How many {i} are there now?", "+"),
    ("There are {a} {i} on the table and {b} {i} in the bag. How many {i} are there in all?", "+"),
    ("{n} finds {a} {i} in the morning and {b} in the evening. How many {i} is that?", "+"),
    ("{n} has {a} {i} and {m} has {b} {i}. How many {i} do they have together?", "+"),
    ("{n} has {a} {i} and gives away {b}. How many {i} are left?", "-"),
    ("There were {a} {i}. {n} took {b}. How many {i} are left?", "-"),
    ("{n} had {a} {i} and lost {b}. How many {i} does {p} still have?", "-"),
    ("{n} has {a} {i}. {m} has {b} fewer. How many {i} does {m} have?", "-"),
)
STORIES_ZH = (
    ("{n}有{a}{i}，又得到{b}{u}。{n}现在有几{i}？", "+"),
    ("{n}有{a}{i}，又买了{b}{u}，一共有多少{i}？", "+"),
    ("桌上有{a}{i}，包里有{b}{i}，一共有几{i}？", "+"),
    ("{n}早上找到{a}{i}，晚上找到{b}{u}，共找到多少{i}？", "+"),
    ("{n}有{a}{i}，{m}有{b}{i}，他们一共有多少{i}？", "+"),
    ("{n}有{a}{i}，送给{m}{b}{u}，还剩几{i}？", "-"),
    ("原来有{a}{i}，{n}拿走了{b}{u}，还剩多少{i}？", "-"),
    ("{n}有{a}{i}，丢了{b}{u}，还有几{i}？", "-"),
    ("{n}有{a}{i}，{m}比{n}少{b}{u}，{m}有几{i}？", "-"),
)
PEOPLE_EN = (
    ("Tom", "he"),
    ("Anna", "she"),
    ("Ben", "he"),
    ("Mary", "she"),
    ("Sam", "he"),
    ("Lily", "she"),
    ("Jack", "he"),
)
PEOPLE_ZH = ("小明", "小红", "小华", "小李", "小王", "丽丽", "明明")
ITEMS_EN = ("apples", "books", "pens", "eggs", "cards", "stones", "cups", "coins", "balls", "pears")
ITEMS_ZH = (
    ("个", "苹果"),
    ("本", "书"),
    ("支", "笔"),
    ("个", "鸡蛋"),
    ("张", "卡片"),
    ("块", "石头"),
    ("个", "杯子"),
    ("个", "球"),
)

Pair = tuple[int, int]


@dataclass(frozen=True)
class Sum:
    """key: the operands that decide the split, smaller first, or the word; question and its exact answer."""

    language: Language
    key: str
    question: str
    answer: str


@dataclass(frozen=True)
class OperandSplit:
    """Unordered pairs and words for training, and those for evaluation only."""

    trained: tuple[Pair, ...]
    unseen: tuple[Pair, ...]
    trained_words: tuple[str, ...]
    unseen_words: tuple[str, ...]


def split_operands(largest: int, share: float, seed: int) -> OperandSplit:
    """Pairs (a, b), 0 <= a <= b <= largest: `share` of them, and of the words, are never trained on."""
    pairs = [(a, b) for a in range(largest + 1) for b in range(a, largest + 1)]
    words = WORDS.split()
    random.Random(derive(seed, "pairs")).shuffle(pairs)
    random.Random(derive(seed, "words")).shuffle(words)
    held, held_words = max(1, round(share * len(pairs))), max(1, round(share * len(words)))
    return OperandSplit(tuple(pairs[held:]), tuple(pairs[:held]), tuple(words[held_words:]), tuple(words[:held_words]))


def expressions(pairs: tuple[Pair, ...], language: Language, chance: random.Random, *, unseen: bool) -> Iterator[Sum]:
    """Endless one-operation expressions over the given pairs, each computed by Python itself."""
    wordings = next(w for w in VALUE if w.language == language)
    while True:
        for pair in chance.sample(pairs, len(pairs)):
            a, b = pair if chance.random() < 0.5 else pair[::-1]
            operation = chance.choices(OPERATIONS, LIKELY)[0]
            if "-" in operation and b > a:
                a, b = b, a
            code = operation.format(a=a, b=b)
            template = chance.choice(wordings.unseen if unseen else wordings.trained)
            yield Sum(language, pair_key(pair), template.format(code), repr(evaluate(operation, a, b)))


def word_expressions(
    words: tuple[str, ...], language: Language, chance: random.Random, *, unseen: bool
) -> Iterator[Sum]:
    """Endless expressions over words: their length, their first letter, in capitals."""
    wordings = next(w for w in VALUE if w.language == language)
    while True:
        for word in chance.sample(words, len(words)):
            operation = chance.choice(WORD_OPERATIONS)
            template = chance.choice(wordings.unseen if unseen else wordings.trained)
            answer = {0: len(word), 1: word.upper(), 2: word[0], 3: word[-1], 4: word * 2, 5: word + "!"}
            value = answer[WORD_OPERATIONS.index(operation)]
            yield Sum(language, word, template.format(operation.format(w=word)), repr(value))


def word_sums(pairs: tuple[Pair, ...], language: Language, chance: random.Random) -> Iterator[Sum]:
    """Endless little stories over the given pairs; the answer is the number alone."""
    while True:
        for pair in chance.sample(pairs, len(pairs)):
            story, sign = chance.choice(STORIES_EN if language == "en" else STORIES_ZH)
            a, b = pair if chance.random() < 0.5 else pair[::-1]
            if sign == "-" and b > a:
                a, b = b, a
            if language == "en":
                (n, p), (m, _) = chance.sample(PEOPLE_EN, 2)
                text = story.format(a=a, b=b, n=n, m=m, p=p, i=chance.choice(ITEMS_EN))
            else:
                n, m = chance.sample(PEOPLE_ZH, 2)
                unit, item = chance.choice(ITEMS_ZH)
                text = story.format(a=a, b=b, n=n, m=m, u=unit, i=unit + item)
            yield Sum(language, pair_key(pair), text, str(a + b if sign == "+" else a - b))


def pair_key(pair: Pair) -> str:
    """The same for 3 + 5 and 5 + 3."""
    return f"{min(pair)},{max(pair)}"


def evaluate(operation: str, a: int, b: int) -> int | bool:
    """The value of one of `OPERATIONS`."""
    values: dict[str, int | bool] = {
        "{a} + {b}": a + b,
        "{a} - {b}": a - b,
        "{a} < {b}": a < b,
        "{a} > {b}": a > b,
        "{a} == {b}": a == b,
        "max({a}, {b})": max(a, b),
        "min({a}, {b})": min(a, b),
    }
    return values[operation]
