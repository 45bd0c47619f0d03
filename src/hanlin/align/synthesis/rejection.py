"""Rejection-sampled answers (RFT, arXiv:2308.01825): many answers a question, the right and different ones kept."""

import math
from collections.abc import Sequence

from hanlin.align.synthesis.novelty import Pool
from hanlin.align.synthesis.recipe import Rejection
from hanlin.align.synthesis.rounds import Ask, Made, Round, answered
from hanlin.align.synthesis.seeds import Seed
from hanlin.align.synthesis.verifiers import Verifier
from hanlin.core.errors import HanlinError


class RejectionMethod:
    """`total` questions, each asked `answers` times. verify(question, answer, reference) >= `least`: kept."""

    unit = "questions"

    def __init__(self, recipe: Rejection, seeds: Sequence[Seed], verify: Verifier) -> None:
        self.total, self._recipe, self._seeds, self._verify = len(seeds), recipe, seeds, verify
        self._rounds = 0

    def done(self) -> int:
        return min(self._rounds * self._recipe.batch, self.total)

    def round(self, number: int, ask: Ask) -> Round:
        first, k = number * self._recipe.batch, self._recipe.answers
        seeds = self._seeds[first : first + self._recipe.batch]
        given = ask("answers", [seed.messages for seed in seeds for _ in range(k)])
        made = Round(asked=len(given))
        for place, seed in enumerate(seeds):
            different, kept = Pool(near=self._recipe.near), 0
            for answer in given[place * k : place * k + k]:
                if not answer:
                    made.drop("no answer", None, seed.name)
                elif self._value(seed, answer) < self._recipe.least:
                    made.drop("not right", answer, seed.name)
                elif different.repeats(answer) is not None:
                    made.drop("as another answer", answer, seed.name)
                elif self._recipe.most is not None and kept >= self._recipe.most:
                    made.drop("enough answers to this question", answer, seed.name)
                else:
                    different.add(answer)
                    kept += 1
                    made.kept.append(Made(answered(seed.messages, answer), seed.name, "rejection", mark=first + place))
        return made

    def absorb(self, made: Round) -> None:
        self._rounds += 1

    def _value(self, seed: Seed, answer: str) -> float:
        try:
            value = float(self._verify(seed.question, answer, seed.reference))
        except HanlinError:
            raise
        except Exception as error:
            raise HanlinError(
                f"The verifier failed at the question {seed.name} with {type(error).__name__}: {error}. "
                f"The answer was {answer[:80]!r}."
            ) from error
        if math.isnan(value):
            raise HanlinError(f"The verifier gave NaN for the question {seed.name}, answer {answer[:80]!r}.")
        return value
