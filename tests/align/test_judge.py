"""A model as judge: what it writes is read, places are exchanged, what cannot be read is counted."""

import re
from collections.abc import Sequence

import pytest

from hanlin.align.build import with_token_ids
from hanlin.align.judge import COMPARE, MARK, Judge, read_mark, read_verdict
from hanlin.align.samples import Prompt, Sample
from hanlin.align.synthesis.rounds import Chat
from hanlin.align.synthesis.writers import EngineWriter
from hanlin.core.errors import HanlinError
from hanlin.engine import Engine, SamplingParams
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer


class Reader:
    """A writer that answers by a rule on the chat's text and remembers what it was asked."""

    name = "reader"

    def __init__(self, rule) -> None:
        self.rule, self.chats, self.sampling = rule, [], None

    def ask(self, chats: Sequence[Chat], sampling: SamplingParams, *, cut: bool = False) -> list[str | None]:
        self.chats, self.sampling = list(chats), sampling
        return [self.rule(place, chat[-1]["content"]) for place, chat in enumerate(chats)]

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None: ...


def answers(text: str) -> tuple[str, str]:
    """The two answers in a question of `compare`, in either language."""
    found = re.search(r"(?:\[Answer A\]|【回答 A】)\n(.*)\n(?:\[End of A\]|【A 结束】)", text, re.DOTALL)
    other = re.search(r"(?:\[Answer B\]|【回答 B】)\n(.*)\n(?:\[End of B\]|【B 结束】)", text, re.DOTALL)
    assert found and other
    return found[1], other[1]


def test_marks_are_read_in_both_languages_and_bad_ones_are_none():
    scale = (0.0, 5.0)
    for said, mark in [
        ("It is right. Score: 1 at first sight.\nScore: 4", 4.0),
        ("**Score: 3.5**", 3.5),
        ("说得对。\n评分：2", 2.0),
        ("评分: 5", 5.0),
        ("Score: 7", None),
        ("Score: -1", None),
        ("I would give it a four", None),
        ("", None),
        (None, None),
    ]:
        assert read_mark(said, scale) == mark, said


def test_verdicts_are_read_in_both_languages():
    for said, verdict in [
        ("Better: A", 1.0),
        ("Better: B, though\nbetter: [[B]]", 0.0),
        ("Better: tie", 0.5),
        ("更好：B", 0.0),
        ("更好：平", 0.5),
        ("Better: Answer", None),
        ("A is better", None),
        (None, None),
    ]:
        assert read_verdict(said) == verdict, said


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_judge_that_goes_by_the_place_says_nothing_and_one_that_reads_says_which(language):
    word = {"en": "Better", "zh": "更好"}[language]
    first = Judge(Reader(lambda _, text: f"{word}: A"), language=language)
    assert first.compare([("q", "one", "other")] * 3) == [0.5] * 3
    assert (first.asked, first.failures) == (6, 0)

    def longer(_: int, text: str) -> str:
        a, b = answers(text)
        return f"{word}：{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'tie'}"

    judge = Judge(Reader(longer), language=language)
    rows = [("why?", "a long answer {x}", "short"), ("why?", "short", "a long answer"), ("why?", "same", "same")]
    assert judge.compare(rows) == [1.0, 0.0, 0.5]
    assert "why?" in judge.writer.chats[0][-1]["content"]


def test_a_comparison_of_which_one_order_cannot_be_read_is_none_and_counted():
    judge = Judge(Reader(lambda place, _: "Better: A" if place in (0, 2, 3) else "who knows"))
    assert judge.compare([("q", "a", "b"), ("q", "a", "b")]) == [None, 0.5]
    assert (judge.asked, judge.failures) == (4, 1)


def test_a_mark_is_the_mean_of_the_askings_that_could_be_read():
    said = ["Score: 4", "nothing", "Score: 1", "no", "none", "Score: 9"]
    writer = Reader(lambda place, _: said[place])
    judge = Judge(writer, "Is it kind?", samples=3)
    assert judge.mark([("q", "a"), ("q", "b")]) == [2.5, None]
    assert (judge.asked, judge.failures) == (6, 4)
    assert writer.sampling.temperature > 0 and "Is it kind?" in writer.chats[0][-1]["content"]
    assert writer.chats[0] == writer.chats[2] != writer.chats[3]
    assert judge.mark([]) == [] and judge.asked == 6


def test_it_is_a_reward():
    judge = Judge(Reader(lambda _, text: f"Score: {text.count('good')}"), scale=(0, 10))
    samples = [Sample(Prompt((1,), "q?", {}), [2], text, [0.0], [True]) for text in ("good good", "bad")]
    base = MARK["en"].count("good")
    assert judge(samples) == [2.0 + base, 0.0 + base]


def test_what_cannot_act_is_refused():
    writer = Reader(lambda *_: "")
    for options in ({"samples": 0}, {"scale": (5, 0)}, {"samples": 2, "sampling": SamplingParams(temperature=0)}):
        with pytest.raises(HanlinError):
            Judge(writer, **options)
    with pytest.raises(HanlinError, match="en or zh"):
        Judge(writer, language="fr")
    assert set(MARK) == set(COMPARE) == {"en", "zh"}


def test_the_own_engine_judges_and_its_noise_is_counted(tokenizer):
    """A model that has learnt nothing writes no mark: every asking is a counted failure, none is believed."""
    config = ModelConfig.uniform(
        "llama", depth=1, attention=AttentionConfig(heads=2, kv_heads=1, head_dim=16),
        feed_forward=FeedForwardConfig(32), vocab_size=tokenizer.size, width=32, max_positions=1024,
    )  # fmt: skip
    model = Transformer(with_token_ids(config, tokenizer)).eval()
    with EngineWriter(Engine(model, tokenizer), "noise") as writer:
        judge = Judge(writer, sampling=SamplingParams(max_tokens=4, temperature=0.0, seed=0))
        assert judge.mark([("二加二等于几？", "四")]) == [None]
        assert judge.compare([("Who are you?", "a model", "nobody")]) == [None]
    assert (judge.asked, judge.failures) == (3, 3)
