"""Conversations as files: what was written is read again; what is none is refused by name."""

import json
import random

import pytest

from hanlin.core.errors import HanlinError
from hanlin.engine import Usage
from hanlin.studio.answer import Answer
from hanlin.studio.conversation import Conversation
from hanlin.studio.portable import read_json, write_json, write_markdown

ANSWER = {"role": "assistant", "content": "a"}


def said(text, model="tiny"):
    answer = Answer(model, text=text)
    answer.ended = "stop"
    answer.usage = Usage(12, 5, 0.25, 1.25, cached_tokens=8)
    return answer


def grow(seed, steps=25):
    """A random tree."""
    draw = random.Random(seed)
    talk = Conversation("Antworte kurz. 简短回答。")
    for step in range(steps):
        depth = len(talk.path())
        if depth == 0 or draw.random() < 0.5:
            talk = talk.ask(f"question {step} 问", draw.randint(0, depth))
        for column in range(2):
            if draw.random() < 0.6:
                place = draw.randrange(len(talk.path()))
                talk = talk.add_answer(place, column, said(f"answer {step}.{column} 答", f"model {column}"))
        place = draw.randrange(len(talk.path()))
        talk = talk.show_question(place, draw.randrange(len(talk.forks()[place].turns)))
    return talk


def as_plain(fork):
    """A tree without identities."""
    turns = [
        (
            turn.question,
            [[(a.model, a.text, a.usage, a.ended) for a in column] for column in turn.answers],
            turn.shown,
            {chosen: as_plain(later) for chosen, later in turn.later.items()},
        )
        for turn in fork.turns
    ]
    return turns, fork.shown


@pytest.mark.parametrize("seed", range(20))
def test_the_whole_tree_comes_back(seed):
    talk = grow(seed)
    back = read_json(write_json(talk).encode())
    assert back.system == talk.system and as_plain(back.start) == as_plain(talk.start)
    assert back.messages(0) == talk.messages(0) and back.messages(1) == talk.messages(1)


def test_the_file_holds_openai_messages():
    talk = Conversation("S").ask("你好").add_answer(0, 0, said("hi")).ask("b")
    messages = json.loads(write_json(talk))["messages"]
    assert messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "b"},
    ]
    for file in (json.dumps(messages), json.dumps({"messages": messages, "model": "other"})):
        back = read_json(file)
        assert back.messages() == messages and back.system == "S"
        assert back.path()[0].answers[0][0].ended == "stop"


def test_parts_of_text_are_read_and_half_characters_are_mended():
    file = '[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "\\ud800b"}]}]'
    assert read_json(file).messages() == [{"role": "user", "content": "a?b"}]


def test_an_empty_conversation_is_one_too():
    assert read_json(write_json(Conversation())).path() == [] and read_json("[]").path() == []


def test_two_thousand_turns_are_read_changed_and_written():
    turns = [message for n in range(2000) for message in ({"role": "user", "content": f"q{n}"}, ANSWER)]
    talk = read_json(json.dumps(turns))
    talk = talk.ask("last").add_answer(2000, 1, said("a")).ask("first, edited", 0)
    assert talk.messages() == [{"role": "user", "content": "first, edited"}]
    assert len(read_json(write_json(talk.show_question(0, 0))).path()) == 2001


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        (b"\xff\xfe{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "no conversation"),
        ("3", "no conversation"),
        ('[{"role": "assistant", "content": "x"}]', "no question"),
        ('[{"role": "tool", "content": "x"}]', "'tool'"),
        ('[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]', "only be the first"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "no text"),
        ('[{"role": "user", "content": null}]', "no text"),
        ('["x"]', "no object"),
        (" " * 8_000_001, "bytes"),
        ('{"hanlin": {"version": 2, "turns": []}}', "version 1"),
        ('{"hanlin": {"version": 1, "turns": [{"parent": 0}]}}', "damaged"),
        ('{"hanlin": {"version": 1, "turns": ["x"]}}', "damaged"),
    ],
)
def test_what_is_no_conversation_is_refused(file, complaint):
    with pytest.raises(HanlinError, match=complaint):
        read_json(file)


@pytest.mark.parametrize("seed", range(300))
def test_a_damaged_file_is_read_or_refused(seed):
    draw = random.Random(seed)
    file = json.loads(write_json(grow(seed % 7, steps=6)))
    places = []

    def collect(value):
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                places.append((value, key))
                collect(value[key])

    collect(file["hanlin"])
    for value, key in draw.sample(places, 2):
        value[key] = draw.choice([None, -1, 7, 1e999, "x", [], {}, True, [0, 0], "\ud800"])
    try:
        talk = read_json(json.dumps(file))
    except HanlinError:
        return
    for column in range(2):
        json.dumps(talk.messages(column), ensure_ascii=False).encode()
    write_json(talk)


def test_markdown_shows_the_path_with_both_models():
    talk = Conversation("S").ask("问").add_answer(0, 0, said("左", "A")).add_answer(0, 1, said("right", "B"))
    text = write_markdown(talk, user="User", system="System prompt", made="Talk")
    assert text == "# Talk\n\n## System prompt\n\nS\n\n## User\n\n问\n\n## A\n\n左\n\n## B\n\nright\n"
