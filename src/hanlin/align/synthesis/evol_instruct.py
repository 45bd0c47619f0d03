"""Evol-Instruct (arXiv:2304.12244): each task becomes harder, or another of its field, epoch after epoch.

    task ─→ one of six rewritings, drawn evenly ─→ eliminated? ─ no ─→ answered, kept, and evolved again next epoch
            (five deeper, one broader)                └─ yes ─→ the task before it is tried again next epoch

Eliminated, as in the paper, is what says the same as before (the writer is asked), copies words of the prompt, is
answered by a short refusal or by nothing but punctuation and small words; and, beside the paper, what repeats a task
that there is already.
"""

import random
from collections.abc import Sequence

from hanlin.align.synthesis.novelty import Pool, words
from hanlin.align.synthesis.prompts import OPERATIONS, PROMPTS
from hanlin.align.synthesis.recipe import EvolInstruct
from hanlin.align.synthesis.rounds import Ask, Made, Round, answered, user
from hanlin.align.synthesis.seeds import Seed
from hanlin.core.seeds import derive

SHORT_REFUSAL = 80  # words: an answer that is sorry and longer may still be one


class EvolInstructMethod:
    """`total` rewritings: epochs x seeds."""

    unit = "rewritings"

    def __init__(self, recipe: EvolInstruct, seeds: Sequence[Seed], *, seed: int, language: str) -> None:
        self.total, self._recipe, self._seed = recipe.epochs * len(seeds), recipe, seed
        self._prompts, self._seeds = PROMPTS[language], seeds
        self._tasks = [each.question for each in seeds]  # as far as each has come
        self._pool = Pool(self._tasks, near=recipe.near)
        self._rounds = 0

    def done(self) -> int:
        epoch, first = self._place(self._rounds)
        return epoch * len(self._seeds) + first

    def round(self, number: int, ask: Ask) -> Round:
        made, fresh = Round(), Pool(near=self._recipe.near)
        epoch, first = self._place(number)
        places = range(first, min(first + self._recipe.batch, len(self._seeds)))
        ways = {place: self._way(epoch, place) for place in places}
        rewritten = ask("evolve", [user(self._evolve(ways[place], place)) for place in places])
        tasks: dict[int, str] = {}
        for place, task in zip(places, rewritten, strict=True):
            if reason := self._fault(task, fresh):
                made.drop(reason, task, self._seeds[place].name)
            elif task:
                fresh.add(task)
                tasks[place] = task
        made.asked = len(places)
        if self._recipe.check_gain and tasks:
            pairs = [self._prompts.same.format(first=self._tasks[p], second=task) for p, task in tasks.items()]
            made.asked += len(pairs)
            for place, verdict in zip(list(tasks), ask("same", [user(pair) for pair in pairs]), strict=True):
                if verdict is None or verdict.strip().casefold().startswith(self._prompts.yes):
                    made.drop("no gain over the task before", tasks.pop(place), self._seeds[place].name)
        answers = ask("answers", [user(task) for task in tasks.values()]) if tasks else []
        made.asked += len(answers)
        for (place, task), answer in zip(tasks.items(), answers, strict=True):
            if reason := self._answer_fault(answer):
                made.drop(reason, task, self._seeds[place].name)
            elif answer:
                whole = answered(user(task), answer)
                way = f"evol_instruct:{ways[place]}"
                made.kept.append(Made(whole, self._seeds[place].name, way, mark=place))
        return made

    def absorb(self, made: Round) -> None:
        self._rounds += 1
        for each in made.kept:
            self._tasks[each.mark] = each.question
            self._pool.add(each.question)

    def _place(self, number: int) -> tuple[int, int]:
        """(epoch, first seed) of a round; a round lies within one epoch."""
        epoch, part = divmod(number, -(-len(self._seeds) // self._recipe.batch))
        return epoch, part * self._recipe.batch

    def _way(self, epoch: int, place: int) -> str:
        return random.Random(derive(self._seed, "way", epoch, place)).choice(OPERATIONS)

    def _fault(self, task: str | None, fresh: Pool) -> str | None:
        if not task or not words(task):
            return "no answer"
        if any(echo in task.casefold() for echo in self._prompts.echoes):
            return "copies the prompt"
        known = self._pool.repeats(task) or fresh.repeats(task)
        return f"repeats {known[:60]!r}" if known else None

    def _evolve(self, way: str, place: int) -> str:
        return self._prompts.evolve[way].format(task=self._tasks[place])

    def _answer_fault(self, answer: str | None) -> str | None:
        if not answer:
            return "no answer"
        spoken = words(answer)
        if all(word in self._prompts.empty for word in spoken):
            return "the answer says nothing"
        refuses = any(sign in answer.casefold() for sign in self._prompts.sorry)
        return "the answer is a refusal" if refuses and len(spoken) < SHORT_REFUSAL else None
