"""Self-Instruct (arXiv:2212.10560): new tasks from a pool that begins with seeds and grows with what it gave.

    a few tasks of the pool, most from the seeds ─→ "write more like these" ─→ filters ─→ answers ─→ pool

A new task is kept if it can be done in writing, has a usual length and its ROUGE-L with every task of the pool is below
0.7 (the paper's filters). The paper lets the model write input and answer of a task apart, classes first; here a task
carries what it needs, as a chat does, and the answer is the writer's to the task alone.
"""

import random
import re
from collections.abc import Sequence

from hanlin.align.synthesis.novelty import Pool, words
from hanlin.align.synthesis.prompts import PROMPTS
from hanlin.align.synthesis.recipe import SelfInstruct
from hanlin.align.synthesis.rounds import Ask, Made, Round, answered, user
from hanlin.align.synthesis.seeds import Seed
from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive

NUMBERED = re.compile(r"^\s*(?:\d+|[一二三四五六七八九十]+)\s*[.)．、:：]\s*(.*)$")
CHINESE = re.compile(r"[\u3400-\u9fff]")
ENDS = tuple('.?!:。？！：…)）"”')
SHORTEST, LONGEST = 4, 150  # words (characters in Chinese) of a task: the paper's


class SelfInstructMethod:
    """`total` new tasks with their answers."""

    unit = "tasks"

    def __init__(self, recipe: SelfInstruct, seeds: Sequence[Seed], *, seed: int, language: str) -> None:
        self.total, self._recipe, self._seed, self._language = recipe.target, recipe, seed, language
        self._prompts = PROMPTS[language]
        self._own = [each.question for each in seeds]
        self._made: list[str] = []
        self._pool = Pool(self._own, near=recipe.near)
        self._fruitless = 0

    def done(self) -> int:
        return len(self._made)

    def round(self, number: int, ask: Ask) -> Round:
        made, fresh = Round(), Pool(near=self._recipe.near)
        chances = random.Random(derive(self._seed, "shown", number))
        lists = ask("tasks", [user(self._request(chances)) for _ in range(self._recipe.asks)], cut=True)
        tasks: list[str] = []
        for text in lists:
            if text is None:
                made.drop("no answer", None, "pool")
            for task in numbered(text or ""):
                if reason := self._fault(task, fresh):
                    made.drop(reason, task, "pool")
                else:
                    fresh.add(task)
                    tasks.append(task)
        tasks = tasks[: self.total - self.done()]
        answers = ask("answers", [user(task) for task in tasks]) if tasks else []
        for task, answer in zip(tasks, answers, strict=True):
            if not answer:
                made.drop("no answer", task, "pool")
            elif words(answer) == words(task):
                made.drop("the answer repeats the task", task, "pool")
            else:
                made.kept.append(Made(answered(user(task), answer), "pool", "self_instruct"))
        made.asked = len(lists) + len(tasks)
        return made

    def absorb(self, made: Round) -> None:
        for each in made.kept:
            self._made.append(each.question)
            self._pool.add(each.question)
        self._fruitless = 0 if made.kept else self._fruitless + 1
        if self._fruitless >= self._recipe.patience:
            some = "; ".join(f"{d['reason']}: {d['text'][:60]!r}" for d in made.dropped[:3]) or "it wrote no list"
            raise HanlinError(
                f"{self._fruitless} rounds gave no new task ({self.done()} of {self.total} made). The last round: "
                f"{some}. Use a writer that follows instructions, more or other seeds, or raise `method.near`."
            )

    def _request(self, chances: random.Random) -> str:
        recipe = self._recipe
        made = chances.sample(self._made, min(recipe.shown_made, len(self._made)))
        own = chances.sample(self._own, min(recipe.shown - len(made), len(self._own)))
        shown = [*own, *made]
        chances.shuffle(shown)
        lines = "\n".join(f"{place}. {' '.join(task.split())}" for place, task in enumerate(shown, start=1))
        return self._prompts.new_tasks.format(examples=lines, count=recipe.new)

    def _fault(self, task: str, fresh: Pool) -> str | None:
        """Why a task is not taken."""
        spoken = words(task)
        if not SHORTEST <= len(spoken) <= LONGEST:
            return "too short or too long"
        if not task[0].isalnum() or bool(CHINESE.search(task)) != (self._language == "zh"):
            return "begins with a sign, or in another language"
        if any(word in (task if self._language == "zh" else spoken) for word in self._prompts.impossible):
            return "not possible in writing"
        known = self._pool.repeats(task) or fresh.repeats(task)
        return f"repeats {known[:60]!r}" if known else None


def numbered(text: str) -> list[str]:
    """The items of a numbered list; lines without a number go on with the item before them. A list that does not end
    with the end of a sentence was cut short, and its last item is left out."""
    items: list[list[str]] = []
    for line in text.splitlines():
        found = NUMBERED.match(line)
        while found and (again := NUMBERED.match(found[1])):  # "1. 3. Write": some number twice
            found = again
        if found:
            items.append([found[1].strip()])
        elif items and line.strip():
            items[-1].append(line.strip())
    whole = items if text.rstrip().endswith(ENDS) else items[:-1]
    return [item for parts in whole if (item := "\n".join(parts).strip())]
