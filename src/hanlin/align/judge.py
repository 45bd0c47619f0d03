"""A model as judge: it is asked for a mark, or which of two answers is better (arXiv:2306.05685, 2212.08073).

    mark       reads question and answer, writes its reasons, then "Score: 4"              the mean of `samples` askings
    compare    reads question and two answers, then "Better: A", "B" or "tie"             asked in both orders, averaged

Judges like what stands first, so a comparison is always asked twice with the places exchanged: a judge that answers by
the place alone gives 0.5. What it writes without a mark in the asked form is no mark: None, and counted in `failures`.
The judge may be the own engine or any endpoint (`synthesis.writers`). As a reward (`align.samples`) it gives marks.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

from hanlin.align.samples import Sample
from hanlin.align.synthesis.rounds import Chat, user
from hanlin.align.synthesis.writers import Writer
from hanlin.core.errors import HanlinError
from hanlin.engine.types import SamplingParams

Language = Literal["en", "zh"]

RUBRIC: dict[Language, str] = {
    "en": "Is it correct, does it do what was asked, and is it clear and no longer than it needs to be?",
    "zh": "内容是否正确，是否做到了问题所要求的，表达是否清楚、不啰嗦。",
}
MARK: dict[Language, str] = {
    "en": (
        "Judge how well a question was answered.\n\nWhat counts: {rubric}\n\n[Question]\n{question}\n\n[Answer]\n"
        "{answer}\n[End of the answer]\n\nName in two or three sentences what is good and what is wrong. Then write "
        "one last line of the form\nScore: N\nwhere N is a number from {low} (useless) to {high} (nothing to improve)."
    ),
    "zh": (
        "请评判下面这个问题回答得怎么样。\n\n评判标准：{rubric}\n\n【问题】\n{question}\n\n【回答】\n{answer}\n【回答结束】\n\n"
        "先用两三句话说明好在哪里、错在哪里，然后另起最后一行，写成\n评分：N\n"
        "其中 N 是 {low}（毫无用处）到 {high}（无可改进）之间的数。"
    ),
}
COMPARE: dict[Language, str] = {
    "en": (
        "Two answers to one question are before you. Which is better?\n\nWhat counts: {rubric}\nNeither the order in "
        "which they stand nor their length counts.\n\n[Question]\n{question}\n\n[Answer A]\n{first}\n[End of A]\n\n"
        "[Answer B]\n{second}\n[End of B]\n\nCompare them in two or three sentences. Then write one last line of the "
        "form\nBetter: X\nwhere X is A, B or tie."
    ),
    "zh": (
        "下面是对同一个问题的两个回答，请判断哪一个更好。\n\n评判标准：{rubric}\n先后次序和长短都不算数。\n\n【问题】\n{question}\n\n"
        "【回答 A】\n{first}\n【A 结束】\n\n【回答 B】\n{second}\n【B 结束】\n\n"
        "先用两三句话比较，然后另起最后一行，写成\n更好：X\n其中 X 是 A、B 或者 平。"
    ),
}
SCORE = re.compile(r"(?:score|评分)\s*[:：]\s*\**\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
BETTER = re.compile(r"(?:better|更好)\s*[:：]\s*[\"'\[*【]*\s*(a|b|tie|平)(?![a-z])", re.IGNORECASE)


class Judge:
    """writer: who judges; rubric: what counts, None: correct, to the point, clear; language: of the questions to it.

    scale: lowest and highest mark. samples: askings a mark, each with a seed of its own; more than one draws at
    temperature 0.7 unless `sampling` says how. asked, failures: how many askings there were, and of how many nothing
    could be read.
    """

    def __init__(
        self,
        writer: Writer,
        rubric: str | None = None,
        *,
        language: Language = "en",
        scale: tuple[float, float] = (0.0, 5.0),
        samples: int = 1,
        sampling: SamplingParams | None = None,
    ) -> None:
        if samples < 1 or not scale[0] < scale[1]:
            raise HanlinError(f"A judge with {samples} askings a mark and marks from {scale[0]:g} to {scale[1]:g}.")
        if language not in RUBRIC:
            raise HanlinError(f"A judge is asked in {' or '.join(RUBRIC)}, not in {language!r}.")
        if sampling is None:
            sampling = SamplingParams(max_tokens=512, temperature=0.7 if samples > 1 else 0.0, seed=0)
        if samples > 1 and sampling.temperature == 0:
            raise HanlinError(f"{samples} askings at temperature 0 are one asking; give a temperature, or samples 1.")
        self.writer, self.rubric, self.language = writer, rubric or RUBRIC[language], language
        self.scale, self.samples, self.sampling = scale, samples, sampling
        self.asked = self.failures = 0

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """Marks, as a reward."""
        return self.mark([(sample.prompt.text, sample.text) for sample in samples])

    def mark(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """(question, answer) -> the mean of the marks that could be read, None where none could."""
        low, high = self.scale
        chats = [
            user(MARK[self.language].format(rubric=self.rubric, question=q, answer=a, low=f"{low:g}", high=f"{high:g}"))
            for q, a in pairs
            for _ in range(self.samples)
        ]
        marks = self._read(chats, lambda answer: read_mark(answer, self.scale))
        return [_mean(marks[at : at + self.samples]) for at in range(0, len(marks), self.samples)]

    def compare(self, rows: Sequence[tuple[str, str, str]]) -> list[float | None]:
        """(question, one answer, another) -> 1 where the one is better in both orders, 0 where the other is, 0.5 for a
        tie or a judge that contradicts itself; the mean over the askings. None unless both orders could be read: one
        alone leans to its first place."""
        chats = []
        for question, one, other in rows:
            for first, second in ((one, other), (other, one)):
                text = COMPARE[self.language].format(rubric=self.rubric, question=question, first=first, second=second)
                chats += [user(text)] * self.samples
        verdicts = self._read(chats, read_verdict)
        shares = [_mean(verdicts[at : at + self.samples]) for at in range(0, len(verdicts), self.samples)]
        return [
            None if said is None or turned is None else (said + 1 - turned) / 2
            for said, turned in zip(shares[::2], shares[1::2], strict=True)
        ]

    def _read(self, chats: Sequence[Chat], read: Callable[[str | None], float | None]) -> list[float | None]:
        """What the judge says to each chat, as far as it can be read."""
        found = [read(answer) for answer in self.writer.ask(chats, self.sampling)] if chats else []
        self.asked += len(found)
        self.failures += found.count(None)
        return found


def read_mark(answer: str | None, scale: tuple[float, float]) -> float | None:
    """The last "Score: N" of an answer; None if there is none, or one outside the scale."""
    found = SCORE.findall(answer or "")
    if not found or not scale[0] <= float(found[-1]) <= scale[1]:
        return None
    return float(found[-1])


def read_verdict(answer: str | None) -> float | None:
    """The last "Better: X" of an answer: A 1, B 0, tie 0.5; None if there is none."""
    found = BETTER.findall(answer or "")
    return {"a": 1.0, "b": 0.0}.get(found[-1].lower(), 0.5) if found else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
