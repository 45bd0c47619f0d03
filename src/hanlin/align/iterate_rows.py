"""From answers and what they are worth to rows that can be learnt: the part of iterated methods that is arithmetic.

    spin            (the file's answer, the model's own)                           arXiv:2401.01335
    best and worst  (argmax r, argmin r) of the answers to one prompt              arXiv:2401.10020, 2402.04792
    rso             accept y with chance exp((r(y) - max r) / beta), pair what is accepted           arXiv:2309.06657
    rft             the best, or the right ones, each once                         arXiv:2308.01825

What teaches nothing is left out and counted: ties, equal texts, answers without a judgement.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hanlin.align.best_of_n import best_of_n
from hanlin.align.samples import Prompt, Sample

Row = dict[str, Any]
Score = float | None  # None: no judgement
Scorer = Callable[[Sequence[Sample]], list[Score]]


@dataclass(frozen=True)
class Question:
    """What is asked: as the engine reads it (`prompt`) and as turns for a file. given: the file's own answer."""

    prompt: Prompt
    turns: Sequence[Mapping[str, Any]]
    given: str | None


@dataclass
class Made:
    """Rows of a round, and what was left out, by reason."""

    rows: list[Row] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def leave_out(self, why: str, number: int = 1) -> None:
        self.counts[why] = self.counts.get(why, 0) + number


def spin_rows(questions: Sequence[Question], samples: Sequence[Sample]) -> Made:
    """The file's answer is chosen, what the model wrote is rejected."""
    made = Made()
    for group in grouped(questions, samples):
        question, answers = group
        for text in dict.fromkeys(sample.text for sample in answers):
            if not text.strip():
                made.leave_out("empty answers")
            elif text.strip() == str(question.given).strip():
                made.leave_out("equal to the file's answer")
            else:
                made.rows.append(pair(question, str(question.given), text))
    return made


def extreme_pairs(questions: Sequence[Question], samples: Sequence[Sample], scores: Sequence[Score]) -> Made:
    """Of the answers to each prompt the best one and the worst one."""
    made, at = Made(), 0
    for question, answers in grouped(questions, samples):
        judged = list(zip(scores[at : at + len(answers)], answers, strict=True))
        at += len(answers)
        known = [(score, sample) for score, sample in judged if score is not None and sample.text.strip()]
        if len(known) < len(judged):
            made.leave_out("answers without a judgement", len(judged) - len(known))
        if len(known) < 2:
            made.leave_out("prompts without two judged answers")
            continue
        best, worst = max(known, key=lambda one: one[0]), min(known, key=lambda one: one[0])
        if best[0] == worst[0]:
            made.leave_out("ties")
        elif best[1].text == worst[1].text:
            made.leave_out("equal texts")
        else:
            made.rows.append(pair(question, best[1].text, worst[1].text, margin=best[0] - worst[0]))
    return made


def rejection_sample(scores: Sequence[float], count: int, beta: float, chance: random.Random) -> list[int]:
    """Places of `count` answers that are accepted one after another, each with chance exp((r - max r) / beta), the
    maximum over those that are still there: draws from the optimal policy pi exp(r / beta), without repetition."""
    left = list(range(len(scores)))
    accepted: list[int] = []
    while left and len(accepted) < count:
        most = max(scores[place] for place in left)
        place = chance.choice(left)
        if chance.random() < math.exp((scores[place] - most) / beta):
            left.remove(place)
            accepted.append(place)
    return accepted


def rso_rows(
    questions: Sequence[Question],
    samples: Sequence[Sample],
    scores: Sequence[Score],
    *,
    accepted: int,
    beta: float,
    seed: int,
) -> Made:
    """Accepted answers in pairs, the one with the higher reward chosen."""
    made, at, chance = Made(), 0, random.Random(seed)
    for question, answers in grouped(questions, samples):
        judged = list(zip(scores[at : at + len(answers)], answers, strict=True))
        at += len(answers)
        by_text = {
            sample.text: (score, sample) for score, sample in judged if score is not None and sample.text.strip()
        }
        if len(by_text) < len(judged):
            made.leave_out("repeated, empty or unjudged answers", len(judged) - len(by_text))
        known = list(by_text.values())
        places = rejection_sample([score for score, _ in known], accepted, beta, chance)
        made.leave_out("not accepted", len(known) - len(places))
        for one, other in zip(places[0::2], places[1::2], strict=False):
            (high, best), (low, worst) = sorted((known[one], known[other]), key=lambda each: -each[0])
            if high == low:
                made.leave_out("ties")
            else:
                made.rows.append(pair(question, best.text, worst.text, margin=high - low))
    return made


def rft_rows(
    questions: Sequence[Question], samples: Sequence[Sample], scores: Sequence[Score], *, threshold: float | None
) -> Made:
    """Rows of fine-tuning: different answers with a reward of at least `threshold`; None: the best of each prompt."""
    made = Made()
    judged = [(sample, score) for sample, score in zip(samples, scores, strict=True) if score is not None]
    if len(judged) < len(samples):
        made.leave_out("answers without a judgement", len(samples) - len(judged))
    if threshold is None:
        kept = best_of_n([sample for sample, _ in judged], [score for _, score in judged])
    else:
        kept = [sample for sample, score in judged if score >= threshold]
    made.leave_out("not the best" if threshold is None else "below the threshold", len(judged) - len(kept))
    seen: set[tuple[int, str]] = set()
    for sample in kept:
        if not sample.text.strip() or sample.finish == "length":
            made.leave_out("empty or unfinished answers")
        elif (sample.group, sample.text.strip()) in seen:
            made.leave_out("repeated answers")
        else:
            seen.add((sample.group, sample.text.strip()))
            answer = {"role": "assistant", "content": sample.text}
            turns = [{**t, "weight": 0} if t["role"] == "assistant" else dict(t) for t in questions[sample.group].turns]
            made.rows.append({"messages": [*turns, answer]})
    return made


def pair(question: Question, chosen: str, rejected: str, **numbers: float) -> Row:
    """A row of preference data."""
    return {"prompt": [dict(turn) for turn in question.turns], "chosen": chosen, "rejected": rejected, **numbers}


def grouped(questions: Sequence[Question], samples: Sequence[Sample]) -> list[tuple[Question, list[Sample]]]:
    """Each question with its answers; answers to one question stand side by side, in the order of the questions."""
    answers: list[list[Sample]] = [[] for _ in questions]
    for sample in samples:
        answers[sample.group].append(sample)
    return list(zip(questions, answers, strict=True))
