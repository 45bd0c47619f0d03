"""A conversation as a tree: editing and answering again lose nothing."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hanlin.studio.conversation import Conversation


@dataclass(frozen=True)
class Said:
    text: str


def talk_of(*turns):
    talk = Conversation()
    for depth, (question, answer) in enumerate(turns):
        talk = talk.ask(question).add_answer(depth, 0, Said(answer))
    return talk


def contents(talk, column=0, depth=None):
    return [message["content"] for message in talk.messages(column, depth)]


def test_turns_follow_each_other():
    talk = talk_of(("你好", "hi"), ("and?", "well"))
    assert contents(talk) == ["你好", "hi", "and?", "well"]
    assert contents(talk, depth=1) == ["你好", "hi", "and?"]
    assert [message["role"] for message in talk.messages()] == ["user", "assistant"] * 2


def test_the_system_prompt_stands_first():
    talk = Conversation("Be brief.").ask("a")
    assert talk.messages() == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]


def test_an_edit_is_a_variant_and_the_old_continuation_stays():
    old = talk_of(("a", "1"), ("b", "2"), ("c", "3"))
    new = old.ask("B", depth=1).add_answer(1, 0, Said("20"))
    assert contents(new) == ["a", "1", "B", "20"]
    assert [(fork.shown, len(fork.turns)) for fork in new.forks()] == [(0, 1), (1, 2), (-1, 0)]
    assert contents(new.show_question(1, 0)) == ["a", "1", "b", "2", "c", "3"]
    assert contents(old) == ["a", "1", "b", "2", "c", "3"]  # a value: nothing happened to it


def test_another_answer_has_its_own_continuation():
    talk = talk_of(("a", "1"), ("b", "2")).add_answer(0, 0, Said("one"))
    assert contents(talk) == ["a", "one"]
    talk = talk.ask("c").add_answer(1, 0, Said("3"))
    assert contents(talk.show_answer(0, 0, 0)) == ["a", "1", "b", "2"]
    assert contents(talk.show_answer(0, 0, 0).show_answer(0, 0, 1)) == ["a", "one", "c", "3"]


def test_what_follows_belongs_to_the_pair_of_answers():
    talk = Conversation().ask("a").add_answer(0, 0, Said("left")).add_answer(0, 1, Said("right"))
    talk = talk.ask("b").add_answer(1, 0, Said("L")).add_answer(1, 1, Said("R"))
    assert contents(talk, 0) == ["a", "left", "b", "L"] and contents(talk, 1) == ["a", "right", "b", "R"]
    again = talk.add_answer(0, 1, Said("right again"))
    assert contents(again, 0) == ["a", "left"] and contents(again, 1) == ["a", "right again"]
    assert contents(again.show_answer(0, 1, 0), 1) == ["a", "right", "b", "R"]


def test_a_second_column_that_joins_late_remembers_the_firsts_answers():
    talk = talk_of(("a", "1")).ask("b").add_answer(1, 0, Said("2")).add_answer(1, 1, Said("zwei"))
    assert contents(talk, 1) == ["a", "1", "b", "zwei"]


def test_an_unanswered_question_stays_one():
    talk = talk_of(("a", "1")).ask("b").ask("c")
    assert contents(talk) == ["a", "1", "b", "c"]


def test_what_is_not_there_cannot_be_shown():
    talk = talk_of(("a", "1"))
    for wrong in (
        lambda: talk.ask("x", depth=3),
        lambda: talk.show_question(0, 1),
        lambda: talk.show_answer(0, 0, -1),
        lambda: talk.add_answer(-1, 0, Said("x")),
    ):
        with pytest.raises(IndexError):
            wrong()


class Twin(RuleBasedStateMachine):
    """Against a twin that keeps, for each place in the history, a plain dictionary of what was shown there."""

    def __init__(self):
        super().__init__()
        self.talk = Conversation()
        self.questions: dict[tuple, list[str]] = {}  # history -> variants
        self.answers: dict[tuple, tuple[list[str], list[str]]] = {}  # history with question -> answers of the columns
        self.chosen: dict[tuple, int] = {}
        self.picked: dict[tuple, list[int]] = {}
        self.count = 0

    def walk(self):
        history: tuple = ()
        places = []
        while self.questions.get(history):
            asked = (*history, ("q", self.chosen[history]))
            places.append((history, asked))
            history = (*asked, ("a", *self.picked[asked]))
        return places, history

    @rule(data=st.data(), back=st.integers(0, 3))
    def ask(self, data, back):
        places, end = self.walk()
        depth = max(0, len(places) - back)
        here = places[depth][0] if depth < len(places) else end
        self.count += 1
        variants = self.questions.setdefault(here, [])
        variants.append(f"question {self.count}")
        self.chosen[here] = len(variants) - 1
        asked = (*here, ("q", len(variants) - 1))
        self.answers[asked], self.picked[asked] = ([], []), [-1, -1]
        self.talk = self.talk.ask(variants[-1], depth)

    @rule(data=st.data(), column=st.integers(0, 1))
    def answer(self, data, column):
        places, _ = self.walk()
        if places:
            depth = data.draw(st.integers(0, len(places) - 1))
            asked = places[depth][1]
            self.count += 1
            self.answers[asked][column].append(f"answer {self.count}")
            self.picked[asked][column] = len(self.answers[asked][column]) - 1
            self.talk = self.talk.add_answer(depth, column, Said(f"answer {self.count}"))

    @rule(data=st.data(), column=st.integers(0, 1))
    def turn_pages(self, data, column):
        places, _ = self.walk()
        if places:
            depth = data.draw(st.integers(0, len(places) - 1))
            here, asked = places[depth]
            if answers := self.answers[asked][column]:
                self.picked[asked][column] = data.draw(st.integers(0, len(answers) - 1))
                self.talk = self.talk.show_answer(depth, column, self.picked[asked][column])
            self.chosen[here] = data.draw(st.integers(0, len(self.questions[here]) - 1))
            self.talk = self.talk.show_question(depth, self.chosen[here])

    @invariant()
    def both_show_the_same(self):
        places, _ = self.walk()
        for column in range(2):
            expected = []
            for here, asked in places:
                expected.append(self.questions[here][self.chosen[here]])
                answers, picked = self.answers[asked], self.picked[asked]
                own = next((c for c in (column, 1 - column) if picked[c] >= 0), None)
                expected += [] if own is None else [answers[own][picked[own]]]
            assert contents(self.talk, column) == expected


TestTwin = Twin.TestCase
TestTwin.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
