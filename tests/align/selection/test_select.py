"""`hanlin data select`: each method over a file of two languages; what is kept, why, and what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from tests.serve.tiny import make_folder

from hanlin.align.build import save_model_folder
from hanlin.align.conversations import read_conversations
from hanlin.align.reward import add_reward_head
from hanlin.align.selection.recipe import SelectionRecipe
from hanlin.align.selection.run import select
from hanlin.cli import main
from hanlin.core.errors import HanlinError
from hanlin.models import Transformer, load_config
from hanlin.tokens import Tokenizer

ROOT = Path(__file__).parents[3]
THINGS = ["fox", "dog", "coin", "object", "狐狸", "狗", "硬币", "书"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "tiny", context=512)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    rows = [
        {"instruction": f"Speak of {thing} 说说{thing} {'really ' * (i % 3)}", "output": f"The {thing} " * (1 + i % 4),
         "reward": float(i * 7 % 16), "id": i}
        for i, thing in enumerate(THINGS * 2)
    ]  # fmt: skip
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return [file]


def lengths(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


SCORES = {"column": "reward"}
METHODS = {
    "reward": {"scores": SCORES, "keep": 5},
    "reward-bins": {"scores": {"scorer": f"{__name__}:lengths"}, "keep": 5, "bins": 4},
    "reward-least": {"scores": SCORES, "least": 11},
    "k_center": {"embed": {"text": "question"}, "keep": 5},
    "nuggets": {"count": 4, "least": None, "keep": 5},
    "car": {"scores": SCORES, "embed": {}, "best": 3},
    "difficulty": {"measure": "perplexity", "keep": 5, "part": "middle"},
    "diversity": {"embed": {"text": "answer"}, "keep": 5, "clusters": 3},
}


def recipe(folder: Path, files, model: Path, kind: str, **more) -> SelectionRecipe:
    method = {"kind": kind.split("-")[0], **METHODS[kind], **more}
    if "embed" in method:
        method["embed"] = {"model": model, **method["embed"]}
    if method["kind"] in ("nuggets", "difficulty"):
        method["model"] = model
    return SelectionRecipe(name=kind, runs=folder, files=files, method=method)


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_keeps_rows_as_they_were_and_says_why_of_each(tmp_path, files, model, kind):
    given = recipe(tmp_path, files, model, kind)
    selection = select(given, quiet=True)
    told = [json.loads(line) for line in (given.out / "selection.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
    kept = [json.loads(line) for line in (given.out / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [each["name"] for each in told] == [f"chat.jsonl:{i}" for i in range(1, 17)]
    assert all(each["reason"] for each in told)
    assert kept == [row for row, each in zip(rows, told, strict=True) if each["kept"]]
    assert len(kept) == len(selection.kept) and (len(kept) == 5 or kind in ("car", "reward-least"))
    assert len(read_conversations([given.out / "kept.jsonl"]).conversations) == len(kept)
    assert (given.out / "selection.png").read_bytes().startswith(b"\x89PNG")
    again = SelectionRecipe.load(given.out / "recipe.yaml")
    before = (given.out / "selection.jsonl").read_bytes()
    select(again, quiet=True)
    assert (given.out / "selection.jsonl").read_bytes() == before


def test_the_best_by_reward_are_the_best_by_reward(tmp_path, files, model):
    given = recipe(tmp_path, files, model, "reward")
    select(given, quiet=True)
    kept = [json.loads(line)["reward"] for line in (given.out / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(kept) == [11, 12, 13, 14, 15]


def test_a_reward_model_scores_every_conversation_as_its_template_writes_it(tmp_path, files, model):
    config = load_config(model)
    torch.manual_seed(1)
    judge, tokenizer = Transformer(config), Tokenizer.load(model)
    add_reward_head(judge, steps=False, seed=1)
    save_model_folder(judge.eval(), tokenizer, tmp_path / "rm")
    given = recipe(tmp_path, files, model, "reward", scores={"reward_model": tmp_path / "rm"})
    found = [decision.score for decision in select(given, quiet=True).decisions]
    for score, each in zip(found, read_conversations(files).conversations, strict=True):
        ids = tokenizer.chat(each.plain(), generate=False)
        end = max(place for place, token in enumerate(ids) if token in tokenizer.stop_ids)  # of the answer's turn
        with torch.no_grad():
            last = judge(torch.tensor([ids[: end + 1]]), logits=None).hidden[0, -1] @ judge.reward.classifier.weight[0]
        assert score == pytest.approx(float(last), abs=1e-5)


def test_what_is_wrong_is_said(tmp_path, files, model):
    with pytest.raises(HanlinError, match="17 are to be kept of 16 examples"):
        select(recipe(tmp_path, files, model, "k_center", keep=17), quiet=True)
    with pytest.raises(HanlinError, match="17 clusters of 16 examples"):
        select(recipe(tmp_path, files, model, "diversity", clusters=17), quiet=True)
    with pytest.raises(HanlinError, match=r"chat.jsonl:1: the column `stars` gives None as the score, not a number"):
        select(recipe(tmp_path, files, model, "reward", scores={"column": "stars"}), quiet=True)
    with pytest.raises(HanlinError, match=":few gave 1 scores for 16 texts"):
        select(recipe(tmp_path, files, model, "reward", scores={"scorer": f"{__name__}:few"}), quiet=True)
    with pytest.raises(ValueError, match="one of `column`, `reward_model` and `scorer`"):
        recipe(tmp_path, files, model, "reward", scores={})
    with pytest.raises(ValueError, match="one of `keep` and `least`"):
        recipe(tmp_path, files, model, "nuggets", least=0.5)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(HanlinError, match=r"empty.jsonl holds no conversation"):
        select(recipe(tmp_path, [empty], model, "reward"), quiet=True)
    other = tmp_path / "other.jsonl"
    other.write_text(
        json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]})
    )
    with pytest.raises(HanlinError, match=r"different formats: .*alpaca.*openai"):
        select(recipe(tmp_path, [*files, other], model, "reward"), quiet=True)
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward/letter.txt").write_text("mine")
    with pytest.raises(HanlinError, match="holds no selection"):
        select(recipe(tmp_path, files, model, "reward"), quiet=True)


def test_a_model_that_cannot_be_found_is_named(tmp_path, files):
    with pytest.raises(HanlinError, match="absent"):
        select(recipe(tmp_path, files, tmp_path / "absent", "difficulty"), quiet=True)


def few(texts: list[str]) -> list[float]:
    return [1.0]


def test_the_command(tmp_path, files, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["data", "select", str(ROOT / "recipes/align/select-ifd.yaml"), "--files", str(files[0]), "--quiet"]
    assert main([*words, "--method.model", str(model), "--method.keep", "1"]) == 0
    told = capsys.readouterr().out
    assert "kept.jsonl: 1 of 16 conversations kept" in told and "selection.png" in told
    assert main(["data", "select"]) == 2
    assert "Which recipe?" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "recipes/align").glob("select-*.yaml")), ids=lambda f: f.stem)
def test_every_recipe_of_the_repository_loads(file):
    assert SelectionRecipe.load(file).name == file.stem
