"""What each method asks, keeps and drops; a run that is killed and goes on writes the file of one that was not."""

import json
from pathlib import Path

import pytest
from tests.align.synthesis.scripted import Dying, Killed, Scripted

from hanlin.align.conversations import read_conversations
from hanlin.align.synthesis.novelty import rouge_l, words
from hanlin.align.synthesis.recipe import SynthesisRecipe
from hanlin.align.synthesis.run import synthesize
from hanlin.align.synthesis.seeds import read_seeds
from hanlin.align.synthesis.self_instruct import numbered
from hanlin.core.errors import HanlinError

NOUNS = (
    "river",
    "tree",
    "stone",
    "cloud",
    "horse",
    "garden",
    "ladder",
    "mirror",
    "engine",
    "island",
    "candle",
    "bridge",
)
VERBS = ("describe", "explain", "compare", "summarise", "translate", "classify", "rewrite", "invent")
ZH_NOUNS = ("江河", "森林", "石桥", "白云", "骏马", "花园", "灯塔", "镜子", "引擎", "海岛", "蜡烛", "胡椒")
ZH_VERBS = ("描写", "解释", "比较", "概括", "翻译", "归类", "改写", "编造")


def recipe(folder: Path, method: dict, seeds: list, **more) -> SynthesisRecipe:
    file = folder / "seeds.jsonl"
    file.write_text("".join(json.dumps(seed, ensure_ascii=False) + "\n" for seed in seeds), encoding="utf-8")
    writer = {"kind": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "unused"}
    return SynthesisRecipe(name="made", runs=folder, seeds=[file], writer=writer, method=method, **more)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "made/conversations.jsonl").read_text(encoding="utf-8").splitlines()]


def reasons(folder: Path) -> list[tuple[str, str]]:
    rounds = (folder / "made/rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [(drop["reason"], drop["text"]) for line in rounds for drop in json.loads(line)["dropped"]]


def inventive(question: str, draw: int) -> str:
    """A list of tasks to who asks for one, an answer to a task."""
    if "numbered" in question:
        lines = [
            f"{i}. {VERBS[(draw >> i) % 8]} the {NOUNS[(draw >> 2 * i) % 12]} near my {NOUNS[(draw >> 3 * i) % 12]} "
            f"in {2 + (draw >> 4 * i) % 90} words"
            for i in range(1, 6)
        ]
        return "\n".join(["Here they are:", *lines])
    if "编好号" in question:
        return "\n".join(
            f"{i}、{ZH_VERBS[(draw >> i) % 8]}一下{ZH_NOUNS[(draw >> 2 * i) % 12]}和{ZH_NOUNS[(draw >> 3 * i) % 12]}"
            for i in range(1, 6)
        )
    return f"An answer to: {question} ({draw % 1000})"


SEEDS = {
    "en": [{"instruction": f"{verb} a {noun} in one line"} for verb, noun in zip(VERBS, NOUNS, strict=False)],
    "zh": [{"instruction": f"{verb}你见过的{noun}"} for verb, noun in zip(ZH_VERBS, ZH_NOUNS, strict=False)],
}


def test_a_numbered_list_is_read_in_both_languages():
    assert numbered("Sure!\n1. One\n2) 7. Two\nof them\n\n3: Three.") == ["One", "Two\nof them", "Three."]
    assert numbered("1. One.\n2. Two is cut in the mid") == ["One."]
    assert numbered("1、写一首诗。\n２．算一算\n三、比较。") == ["写一首诗。", "算一算", "比较。"]
    assert numbered("no list") == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_self_instruct_makes_new_tasks_that_sft_reads(tmp_path, language):
    method = {"kind": "self_instruct", "target": 24, "asks": 3}
    made = synthesize(
        recipe(tmp_path, method, SEEDS[language], language=language), writer=Scripted(inventive), quiet=True
    )
    assert made.kept == 24
    read = read_conversations([made.file]).conversations
    assert [m.role for c in read for m in c.messages] == ["user", "assistant"] * 24
    assert {(row["source"], row["method"]) for row in rows(tmp_path)} == {("pool", "self_instruct")}
    texts = [seed["instruction"] for seed in SEEDS[language]]
    texts += [row["messages"][0]["content"] for row in rows(tmp_path)]
    pairs = [(a, b) for i, a in enumerate(texts) for b in texts[:i] if i >= len(SEEDS[language])]
    assert max(rouge_l(words(a), words(b)) for a, b in pairs) < 0.7
    assert any(reason.startswith("repeats") for reason, _ in reasons(tmp_path))


def test_self_instruct_drops_what_the_paper_drops_and_says_why(tmp_path):
    bad = """1. Draw it
2. Draw a picture of the old harbour
3. 写一首关于春天的诗
4. "Quoted" task with a start
5. describe a river in one line!
6. Name four rivers of Asia
7. Count how many legs spiders have."""

    def say(question: str, draw: int) -> str | None:
        if "numbered" in question:
            return bad
        return None if "legs" in question else question if "river" in question else "fine"

    method = {"kind": "self_instruct", "target": 3, "asks": 1, "patience": 1}
    with pytest.raises(HanlinError, match="1 rounds gave no new task"):
        synthesize(recipe(tmp_path, method, SEEDS["en"]), writer=Scripted(say), quiet=True)
    told = {text[:8]: reason for reason, text in reasons(tmp_path)}
    assert told["Draw it"] == "too short or too long"
    assert told["Draw a p"] == "not possible in writing"
    assert told["写一首关于春天的"] == told['"Quoted"'] == "begins with a sign, or in another language"
    assert told["describe"].startswith("repeats 'describe a river")
    assert told["Name fou"] == "the answer repeats the task"
    assert told["Count ho"] == "no answer"


def evolving(question: str, draw: int) -> str | None:
    """Rewrites with a word more; some rewritings are bad on purpose."""
    if question.startswith("Compare two tasks"):
        return "Same" if "mirror" in question else "Different."
    if "Task:\n" in question:
        task = question.split("Task:\n")[1]
        fate = {"river": None, "tree": f"The harder task: {task}", "stone": task}
        for noun, text in fate.items():
            if noun in task:
                return text
        return f"{task}, then {VERBS[draw % 8]} {NOUNS[(draw >> 3) % 12]} number {draw % 997}"
    if "cloud" in question:
        return "Sorry, I cannot help with that."
    return "... the !" if "horse" in question else "A proper answer."


def test_evol_instruct_eliminates_as_the_paper_says_and_evolves_the_rest_again(tmp_path):
    nouns = ["river", "tree", "stone", "cloud", "horse", "mirror", "garden", "ladder"]
    seeds = [{"instruction": f"describe the {noun}"} for noun in nouns]
    method = {"kind": "evol_instruct", "epochs": 3, "batch": 3}
    synthesize(recipe(tmp_path, method, seeds), writer=Scripted(evolving), quiet=True)
    told = [(reason.split(" '")[0], text) for reason, text in reasons(tmp_path)]
    assert ("no answer", "") in told
    assert ("copies the prompt", "The harder task: describe the tree") in told
    assert ("repeats", "describe the stone") in told
    for noun, reason in [
        ("cloud", "the answer is a refusal"),
        ("horse", "the answer says nothing"),
        ("mirror", "no gain over the task before"),
    ]:
        assert any(r == reason and noun in text for r, text in told)
    kept = [row for row in rows(tmp_path) if row["source"] == "seeds.jsonl:8"]
    questions = [row["messages"][0]["content"] for row in kept]
    assert questions and all(q.startswith("describe the ladder") for q in questions)
    assert [q.count("then") for q in questions] == list(range(1, len(questions) + 1))  # each from the one before
    assert all(row["method"].startswith("evol_instruct:") for row in kept)


def test_evol_instruct_speaks_chinese(tmp_path):
    def say(question: str, draw: int) -> str:
        if question.startswith("比较两个任务"):
            return "不同"
        if "任务：\n" in question:
            return f"{question.split('任务：' + chr(10))[1]}，并且不超过{draw % 997}个字"
        return "好的，答案在这里。"

    seeds = [{"instruction": f"描写{noun}"} for noun in ZH_NOUNS]
    method = {"kind": "evol_instruct", "epochs": 2, "batch": 5}
    made = synthesize(recipe(tmp_path, method, seeds, language="zh"), writer=Scripted(say), quiet=True)
    assert made.kept + sum(made.dropped.values()) == 24 and made.kept > 18


def adding(question: str, draw: int) -> str | None:
    a, b = (int(part) for part in question.split("+"))
    offset = draw % 3
    return None if draw % 11 == 0 else f"{['It is', 'The sum is', '和是'][draw % 5 % 3]} {a + b + (offset == 0)}。"


SUMS = [{"question": f"{a}+{a + 1}", "answer": f"#### {2 * a + 1:,}"} for a in range(498, 518)]


def test_rejection_keeps_right_and_different_answers(tmp_path):
    method = {"kind": "rejection", "answers": 10, "batch": 6}
    made = synthesize(recipe(tmp_path, method, SUMS), writer=Scripted(adding), quiet=True)
    by_question: dict[str, list[str]] = {}
    for row in rows(tmp_path):
        question, answer = (message["content"] for message in row["messages"])
        a, b = question.split("+")
        assert f" {int(a) + int(b)}。" in answer
        by_question.setdefault(question, []).append(answer)
    assert all(len(set(answers)) == len(answers) <= 3 for answers in by_question.values())
    assert set(made.dropped) == {"no answer", "not right", "as another answer"}
    assert made.kept + sum(made.dropped.values()) == made.asked == 200


def test_at_most_so_many_answers_a_question(tmp_path):
    method = {"kind": "rejection", "answers": 10, "most": 1}
    made = synthesize(recipe(tmp_path, method, SUMS), writer=Scripted(adding), quiet=True)
    assert made.kept <= len(SUMS) and "enough answers to this question" in made.dropped


METHODS = {
    "self_instruct": ({"kind": "self_instruct", "target": 20, "asks": 2}, SEEDS["en"], inventive),
    "evol_instruct": ({"kind": "evol_instruct", "epochs": 3, "batch": 3}, SEEDS["en"], evolving),
    "rejection": ({"kind": "rejection", "answers": 4, "batch": 3}, SUMS, adding),
}


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_file(tmp_path, kind):
    method, seeds, say = METHODS[kind]
    whole = Scripted(say)
    made = synthesize(recipe(tmp_path, method, seeds), writer=whole, quiet=True)
    wanted = made.file.read_bytes()
    for after in (0, 1, 2, 4, 5):
        folder = tmp_path / f"{after}"
        folder.mkdir()
        given = recipe(folder, method, seeds)
        with pytest.raises(Killed):
            synthesize(given, writer=Dying(say, after), quiet=True)
        log = given.out / "rounds.jsonl"
        log.write_bytes(log.read_bytes() + b'{"step": 99, "kept": [{"messa')  # torn in the middle of a line
        resumed = Scripted(say)
        assert synthesize(given, writer=resumed, quiet=True).file.read_bytes() == wanted
        assert resumed.asked < whole.asked or after <= 2
        again = Scripted(say)
        assert synthesize(given, writer=again, quiet=True).file.read_bytes() == wanted
        assert again.asked == 0  # a finished run asks nothing


def test_a_higher_target_goes_on_and_another_recipe_is_refused(tmp_path):
    method, seeds, say = METHODS["evol_instruct"]
    first = synthesize(recipe(tmp_path, method | {"epochs": 1}, seeds), writer=Scripted(say), quiet=True)
    more = synthesize(recipe(tmp_path, method, seeds), writer=Scripted(say), quiet=True)
    assert more.kept > first.kept
    with pytest.raises(HanlinError, match="made otherwise"):
        synthesize(recipe(tmp_path, method, seeds, seed=1), writer=Scripted(say), quiet=True)
    anew = recipe(tmp_path, method, seeds, seed=1, overwrite=True)
    assert synthesize(anew, writer=Scripted(say), quiet=True).kept
    with pytest.raises(HanlinError, match="made otherwise"):
        synthesize(recipe(tmp_path, method, seeds[1:], seed=1), writer=Scripted(say), quiet=True)


def test_bad_seeds_and_verifiers_are_named(tmp_path):
    method = {"kind": "rejection"}
    with pytest.raises(HanlinError, match=r"seeds.jsonl holds no seeds: it has no rows"):
        synthesize(recipe(tmp_path, method, []), quiet=True)
    with pytest.raises(HanlinError, match=r"seeds.jsonl, row 1 has no question: it has `text`"):
        synthesize(recipe(tmp_path, method, [{"text": "?"}]), quiet=True)
    with pytest.raises(HanlinError, match=r"seeds.jsonl:1 has no answer, and the verifier 'last_number' compares"):
        synthesize(recipe(tmp_path, method, [{"question": "1+1"}]), quiet=True)
    with pytest.raises(HanlinError, match="no verifier 'exakt'; it is one of exact, last_number"):
        synthesize(recipe(tmp_path, method | {"verifier": "exakt"}, SUMS), quiet=True)
    with pytest.raises(HanlinError, match="There is no module 'not_here'"):
        synthesize(recipe(tmp_path, method | {"verifier": "not_here:f"}, SUMS), quiet=True)
    with pytest.raises(HanlinError, match=r"verifier gave NaN for the question seeds.jsonl:1"):
        synthesize(
            recipe(tmp_path, method | {"verifier": f"{__name__}:broken"}, SUMS), writer=Scripted(adding), quiet=True
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other/made").mkdir()
    (tmp_path / "other/made/letter.txt").write_text("mine")
    with pytest.raises(HanlinError, match="is not empty and holds no synthesis"):
        synthesize(recipe(tmp_path / "other", method, SUMS), writer=Scripted(adding), quiet=True)


def test_conversations_and_lines_are_seeds_too(tmp_path):
    (tmp_path / "chat.json").write_text(
        json.dumps([{"messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
        ]}])
    )  # fmt: skip
    (tmp_path / "alpaca.json").write_text(
        json.dumps([{"instruction": "把它译成英文", "input": "你好", "output": "Hello"}])
    )
    (tmp_path / "tasks.txt").write_text("写一首诗\n\nName a river\n写一首诗\n", encoding="utf-8")
    chat, alpaca, one, two = read_seeds([tmp_path / name for name in ("chat.json", "alpaca.json", "tasks.txt")])
    assert [m["role"] for m in chat.messages] == ["system", "user"] and chat.reference == "2"
    assert (alpaca.question, alpaca.reference) == ("把它译成英文\n你好", "Hello")
    assert (one.question, two.question, two.name) == ("写一首诗", "Name a river", "tasks.txt:3")


def broken(question: str, answer: str, reference: str | None) -> float:
    return float("nan")
