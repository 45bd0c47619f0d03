"""Iterated methods: what is learnt from answers and scores, rejection sampling against its closed form, and whole runs
that are resumed without doing anything twice."""

import io
import json
import math
import random
import shutil
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from rich.console import Console
from tests.align.judged_runs import assert_same, save_base, saved_weights, tiny_recipe, written

from hanlin.align.build import train
from hanlin.align.iterate import compared
from hanlin.align.iterate_recipe import IteratedObjective
from hanlin.align.iterate_rows import Question, extreme_pairs, rejection_sample, rft_rows, rso_rows, spin_rows
from hanlin.align.judge import Judge
from hanlin.align.on_policy_recipe import FunctionReward
from hanlin.align.preview import preview
from hanlin.align.recipe import SftObjective
from hanlin.align.samples import Prompt, Sample
from hanlin.core.errors import HanlinError

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
    for i in range(8)
]
FEWER_E = FunctionReward(function="tests.align.test_iterate:fewer_e")


def fewer_e(samples):
    """A reward that every text has."""
    return [-float(sample.text.count("e")) - len(sample.text) / 1000 for sample in samples]


def asked(*texts: str) -> list[Question]:
    return [
        Question(Prompt((1,), text, {}, place), [{"role": "user", "content": text}], f"given {place}")
        for place, text in enumerate(texts)
    ]


def said(*texts: tuple[int, str]) -> list[Sample]:
    questions = asked("first", "second")
    return [
        Sample(questions[group].prompt, [1], text, [0.0], [True], "length" if text.endswith("…") else "stop", group)
        for group, text in texts
    ]


def test_spin_sets_the_files_answer_against_the_models_own():
    made = spin_rows(asked("first", "second"), said((0, "given 0"), (1, "mine")))
    assert made.rows == [{"prompt": [{"role": "user", "content": "second"}], "chosen": "given 1", "rejected": "mine"}]
    assert made.counts == {"equal to the file's answer": 1}


def test_of_many_answers_the_best_and_the_worst_are_compared():
    samples = said((0, "a"), (0, "b"), (0, "c"), (1, "d"), (1, "e"), (1, "f"))
    made = extreme_pairs(asked("first", "second"), samples, [2.0, 5.0, 1.0, None, 3.0, 3.0])
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in made.rows] == [("b", "c", 4.0)]
    assert made.counts == {"answers without a judgement": 1, "ties": 1}
    made = extreme_pairs(asked("first", "second"), samples, [None] * 6)
    assert not made.rows and made.counts["prompts without two judged answers"] == 2


def test_rejection_sampling_draws_from_the_tilted_policy():
    """The first accepted answer has chance exp(r / beta) / sum, the following ones that without replacement."""
    scores, beta, chance = [0.0, 0.5, 1.2], 0.7, random.Random(0)
    draws = Counter(tuple(rejection_sample(scores, 2, beta, chance)) for _ in range(20_000))
    weights = [math.exp(score / beta) for score in scores]
    for first, second in permutations(range(3), 2):
        exact = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
        deviation = math.sqrt(exact * (1 - exact) / 20_000)
        assert abs(draws[first, second] / 20_000 - exact) < 4.5 * deviation
    assert len(rejection_sample(scores, 9, beta, chance)) == 3


def test_rso_pairs_what_was_accepted():
    samples = said(*[(0, f"answer {place}") for place in range(8)], (1, "same"), (1, "same"))
    made = rso_rows(asked("first", "second"), samples, [float(p) for p in range(10)], accepted=4, beta=1.0, seed=0)
    assert len(made.rows) == 2
    assert all(int(row["chosen"][-1]) > int(row["rejected"][-1]) for row in made.rows)
    assert made.counts["not accepted"] == 4 and made.counts["repeated, empty or unjudged answers"] == 1


def test_rft_keeps_the_best_or_the_right_ones_once():
    samples = said((0, "a"), (0, "b"), (0, "b"), (1, "c…"), (1, "d"))
    questions = asked("first", "second")
    best = rft_rows(questions, samples, [0.0, 1.0, 1.0, 0.0, 0.5], threshold=None)
    assert [row["messages"][-1]["content"] for row in best.rows] == ["b", "d"]
    right = rft_rows(questions, samples, [0.0, 1.0, 1.0, 1.0, None], threshold=1.0)
    assert [row["messages"][-1]["content"] for row in right.rows] == ["b"]
    assert right.counts["repeated answers"] == right.counts["empty or unfinished answers"] == 1
    assert right.counts["answers without a judgement"] == 1 and right.counts["below the threshold"] == 1


class LongerIsBetter:
    """A judge that prefers the longer text, wherever it stands; of marks, it cannot make up its mind on `mute`."""

    name = "longer"

    def ask(self, chats, sampling):
        answers = []
        for chat in chats:
            text = chat[-1]["content"]
            if "[Answer A]" in text:
                a = text.split("[Answer A]\n")[1].split("\n[End of A]")[0]
                b = text.split("[Answer B]\n")[1].split("\n[End of B]")[0]
                answers.append(f"Better: {'A' if len(a) > len(b) else 'B'}")
            else:
                answer = text.split("[Answer]\n")[1].split("\n[End of the answer]")[0]
                answers.append("Hm." if answer == "mute" else f"Score: {min(5, len(answer))}")
        return answers


def test_a_judges_marks_and_comparisons_become_pairs():
    samples = said((0, "a"), (0, "bbb"), (1, "mute"), (1, "dd"))
    judge = Judge(LongerIsBetter(), samples=3)
    made = extreme_pairs(asked("first", "second"), samples, judge(samples))
    assert [(row["chosen"], row["rejected"]) for row in made.rows] == [("bbb", "a")]
    assert judge.failures == 3 and made.counts["prompts without two judged answers"] == 1
    scores = compared(Judge(LongerIsBetter()), samples)
    assert scores == [0.0, 1.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), tokenizer_folder)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, base) -> Path:
    """The model after it has learnt to answer, more or less: its answers end."""
    folder = tmp_path_factory.mktemp("taught")
    chats = SftObjective(files=[written(folder, CHATS)])
    recipe = tiny_recipe(folder, base, chats, steps=60, lr=3e-3)
    train(recipe, quiet=True)
    return recipe.out / "model"


def recipe_of(folder: Path, base: Path, *, rows=CHATS, name: str = "run", **options):
    objective = IteratedObjective(files=[written(folder, rows)], max_tokens=12, **options)
    return tiny_recipe(folder, base, objective, name=name, steps=2, lr=1e-3)


def test_spin_plays_against_its_last_iterate_and_does_nothing_twice(tmp_path, base):
    recipe = recipe_of(tmp_path, base, method="spin", rounds=2)
    result = train(recipe, quiet=True)
    assert result.finished
    rounds = [json.loads((recipe.out / f"round-{k}" / "round.json").read_text()) for k in (1, 2)]
    assert [row["rows"] for row in rounds] == [8, 8]
    pairs = [json.loads(line) for line in (recipe.out / "round-2" / "rows.jsonl").read_text().splitlines()]
    assert {row["chosen"] for row in pairs} == {f"It is {i}." for i in range(8)}
    last = saved_weights(recipe.out)
    assert_same(last, saved_weights(recipe.out / "round-2" / "run"))
    before = {file: file.stat().st_mtime_ns for file in recipe.out.glob("round-*/**/*") if file.is_file()}
    shutil.rmtree(recipe.out / "model")
    train(recipe, quiet=True)
    assert {file: file.stat().st_mtime_ns for file in recipe.out.glob("round-*/**/*") if file.is_file()} == before
    assert_same(saved_weights(recipe.out), last)
    for part in ("model", "round-2/round.json", "round-2/run/model", "round-2/made.json", "round-2/rows.jsonl"):
        path = recipe.out / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(recipe.out / "round-2" / "run")
    train(recipe, quiet=True)
    assert_same(saved_weights(recipe.out), last)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "online_dpo", "rounds": 2, "rewards": [FEWER_E]},
        {"method": "rso", "answers": 8, "rewards": [FEWER_E]},
        {"method": "rft", "answers": 3, "keep": "correct", "threshold": -2.0, "rewards": [FEWER_E]},
        {"method": "rft", "rounds": 2, "answers": 3, "annotators": [FEWER_E]},
    ],
    ids=["online_dpo", "rso", "rft", "rft with a refreshed reward model"],
)
def test_whole_runs(tmp_path, taught, options):
    prompts = [{"prompt": f"What is {i}?"} for i in range(6)]
    held = [] if "annotators" in options else [written(tmp_path, prompts[:2], "held.jsonl")]
    recipe = recipe_of(tmp_path, taught, rows=prompts, held_out=held, prompts_a_round=4, **options)
    assert train(recipe, quiet=True).finished and (recipe.out / "model" / "model.safetensors").exists()
    report = (recipe.out / "report.md").read_text()
    assert report.count("\n| ") == 1 + 1 + options.get("rounds", 1)
    resolved = (recipe.out / "round-2" / "run" / "recipe.yaml") if options.get("rounds") == 2 else None
    if options["method"] == "online_dpo" and resolved:
        assert f"reference: {taught}" in resolved.read_text(), "what online methods compare with stays the first model"
    if "annotators" in options:
        for number in (1, 2):
            assert (recipe.out / f"round-{number}" / "reward" / "model").is_dir(), "anew each round"


def test_rounds_of_another_recipe_are_refused_and_more_rounds_go_on(tmp_path, taught):
    recipe = recipe_of(tmp_path, taught, method="spin", rounds=1, prompts_a_round=3)
    train(recipe, quiet=True)
    hotter = recipe_of(tmp_path, taught, method="spin", rounds=2, prompts_a_round=3, temperature=1.5)
    with pytest.raises(HanlinError, match=r"`objective\.temperature` was None, now 1\.5"):
        train(hotter, quiet=True)
    before = (recipe.out / "round-1" / "round.json").stat().st_mtime_ns
    train(recipe_of(tmp_path, taught, method="spin", rounds=2, prompts_a_round=3), quiet=True)
    assert (recipe.out / "round-1" / "round.json").stat().st_mtime_ns == before
    assert (recipe.out / "round-2" / "round.json").exists()


def test_a_preview_shows_the_prompts(tmp_path, taught):
    console = Console(file=io.StringIO(), width=200)
    preview(recipe_of(tmp_path, taught, method="spin", rounds=2), rows=2, console=console)
    told = console.file.getvalue()
    assert "What is 0?" in told and "8 prompts; 2 rounds, 1 answers to each" in told


def test_a_model_that_gives_no_marks_is_told_so(tmp_path, taught):
    """Its own judge says nothing that can be read: every answer is counted, and the error says what to look at."""
    recipe = recipe_of(tmp_path, taught, method="self_rewarding", rounds=1, prompts_a_round=2)
    with pytest.raises(HanlinError, match="8 answers without a judgement"):
        train(recipe, quiet=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "spin", "accepted": 2}, "`accepted` does nothing in method spin, only in rso"),
        ({"method": "rso"}, "needs `rewards`"),
        ({"method": "online_dpo", "rewards": [FEWER_E], "answers": 1}, "must be at least 2"),
        ({"method": "rft", "rewards": [FEWER_E], "threshold": 1.0}, "`threshold` belongs to `keep: correct`"),
    ],
)
def test_options_that_do_not_act_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        IteratedObjective(files=["x"], **options)


def test_spin_wants_answers(tmp_path, base):
    recipe = recipe_of(tmp_path, base, rows=[{"prompt": "What is 1?"}], method="spin")
    with pytest.raises(HanlinError, match=r"row 1 has no answer"):
        train(recipe, quiet=True)
