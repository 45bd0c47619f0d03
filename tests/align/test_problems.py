"""Problems made by a program: right, in two languages, and held out by their numbers."""

import json
import re
from itertools import pairwise

import pytest

from hanlin.align.conversations import read_conversations
from hanlin.align.problems import KINDS, is_held_out, make_problems, write_problems
from hanlin.core.errors import HanlinError


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_right_and_every_step_of_the_reasoning(kind):
    problems = make_problems(kind, 200, largest=30, terms=4)
    assert len(problems) == 200 and {p.language for p in problems} == {"en", "zh"}
    for problem in problems:
        steps = problem.reasoning.split("; ")
        assert all(eval(step.split(" = ")[0]) == int(step.split(" = ")[1]) for step in steps)
        assert steps[-1].endswith(f"= {problem.answer}") and int(problem.answer) >= 0
        asked = [int(number) for number in re.findall(r"\d+", problem.prompt)]
        assert len(asked) == (2 if kind == "sum" else 4) and str(asked[0]) == steps[0].split()[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_pair_of_numbers_is_trained_and_held_out(kind):
    pairs = []
    for held_out in (False, True):
        problems = make_problems(kind, 150, largest=20, held_out=held_out, seed=4)
        asked = [[int(n) for n in re.findall(r"\d+", p.prompt)] for p in problems]
        pairs.append({frozenset(pair) for numbers in asked for pair in pairwise(numbers)})
    assert pairs[1] and not pairs[0] & pairs[1]
    assert is_held_out(3, 9, share=0.5, seed=1) == is_held_out(9, 3, share=0.5, seed=1)


def test_the_files_are_what_training_reads(tmp_path):
    counts = write_problems(tmp_path, "chain", train=40, held_out=10, largest=20, worked=25)
    assert counts == {"train.jsonl": 40, "held-out.jsonl": 10, "worked.jsonl": 25}
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    conversations = read_conversations([tmp_path / "worked.jsonl"]).conversations
    said = conversations[0].plain()
    assert said[0]["content"] == rows[0]["prompt"]
    assert said[1]["content"] == f"<think>{rows[0]['reasoning']}</think> {rows[0]['answer']}"
    again = write_problems(tmp_path / "again", "chain", train=40, held_out=10, largest=20, worked=25)
    assert again == counts
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()


def test_what_cannot_be_made_is_refused():
    with pytest.raises(HanlinError, match="'product'"):
        make_problems("product", 3, largest=9)
    with pytest.raises(HanlinError, match="terms 1"):
        make_problems("chain", 3, largest=9, terms=1)
    none = next(
        s for s in range(99) if not any(is_held_out(a, b, share=0.1, seed=s) for a in range(4) for b in range(4))
    )
    with pytest.raises(HanlinError, match="No held-out problem"):
        make_problems("sum", 3, largest=3, held_out=True, seed=none)


def test_long_chains_of_held_out_pairs_are_found():
    assert len(make_problems("chain", 20, largest=60, terms=8, held_out=True)) == 20
