"""A preference task whose truth a program knows: short answers about things, worth a hidden sum of five traits.

    worth = 1.0 the colour is right  + 0.8 it begins "Gladly."  - 1.0 it begins "Hm."  + 0.6 it ends with thanks
            - 0.3 for each sentence beyond the second

The chats that a model is first tuned on have every trait by chance (the colour is right in two of three), so it knows
all of them and prefers none. Questions about some pairs of a thing and a form are never trained.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

COLOURS = ["red", "green", "blue", "yellow", "white", "black"]
THINGS = {
    "frog": "green", "sky": "blue", "snow": "white", "coal": "black", "sun": "yellow", "rose": "red", "grass": "green",
    "sea": "blue", "milk": "white", "raven": "black", "lemon": "yellow", "blood": "red", "leaf": "green",
    "swan": "white", "night": "black", "honey": "yellow", "cherry": "red", "ink": "blue", "moss": "green",
    "salt": "white",
}  # fmt: skip
FORMS = ["Tell me about the {}.", "What is the {} like?", "Describe the {}.", "What do you know of the {}?",
         "Say something about the {}."]  # fmt: skip
OPENINGS = ["Gladly.", "Hm.", "Well.", "So."]
MORE = ["People like it.", "It is old.", "You may see it often.", "I saw one today."]
CLOSINGS = ["Thank you for asking.", "That is all.", "There it is."]


def questions() -> tuple[list[str], list[str]]:
    """(to train on, held out): every thing and every form is in both, no pair of them is."""
    train, held = [], []
    for place, thing in enumerate(THINGS):
        for number, form in enumerate(FORMS):
            (held if number == place % len(FORMS) else train).append(form.format(thing))
    return train, held


def chat(question: str, chance: random.Random) -> dict[str, Any]:
    """A row of fine-tuning with an answer of any worth."""
    said = {"role": "assistant", "content": answer(question, chance)}
    return {"messages": [{"role": "user", "content": question}, said]}


def answer(question: str, chance: random.Random) -> str:
    thing = thing_of(question)
    colour = THINGS[thing] if chance.random() < 2 / 3 else chance.choice(COLOURS)
    more = chance.sample(MORE, chance.randrange(3))
    return " ".join([chance.choice(OPENINGS), f"The {thing} is {colour}.", *more, chance.choice(CLOSINGS)])


def thing_of(question: str) -> str:
    return next(word for word in re.findall(r"[a-z]+", question.lower())[::-1] if word in THINGS)


def worth(question: str, text: str) -> float:
    """What an answer is truly worth."""
    thing = thing_of(question)
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
    value = 1.0 * (f"The {thing} is {THINGS[thing]}." in text)
    value += 0.8 * text.startswith("Gladly.") - 1.0 * text.startswith("Hm.") + 0.6 * text.rstrip().endswith("asking.")
    return value - 0.3 * max(0, len(sentences) - 2)


def reward(samples: Sequence[Any]) -> list[float]:
    """`worth` as a reward of `hanlin` recipes."""
    return [worth(sample.prompt.text, sample.text) for sample in samples]
