"""`hanlin data build` as it is typed."""

import re
from pathlib import Path

import pytest

from hanlin.cli import main
from hanlin.data.recipe import DataRecipe
from hanlin.data.shards import TokenShards


@pytest.fixture
def recipe(tokenizer, documents, tmp_path) -> Path:
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("§".join(document.text for document in documents))
    (tmp_path / "recipe.yaml").write_text(
        f"out: {tmp_path}/shards\ntokenizer: {tmp_path}/tokenizer\n"
        f"sources:\n  - paths: [{tmp_path}/texts]\n    separator: §\n"
    )
    return tmp_path / "recipe.yaml"


def test_build_then_build_again(recipe, documents, tmp_path, capsys):
    assert main(["data", "build", str(recipe), "--shard_mb", "0.004"]) == 0
    shown = capsys.readouterr()
    assert "120 documents" in shown.out
    assert TokenShards(tmp_path / "shards").documents == len(documents)
    assert main(["data", "build", str(recipe), "--shard_mb", "0.004", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "120 documents" in shown.out
    assert shown.err == ""


def test_changed_text_is_noticed(recipe, tmp_path, capsys):
    assert main(["data", "build", str(recipe), "--quiet"]) == 0
    (tmp_path / "texts" / "b.txt").write_text("more text")
    assert main(["data", "build", str(recipe), "--quiet"]) == 2
    assert "made otherwise (other source)" in capsys.readouterr().err
    assert main(["data", "build", str(recipe), "--quiet", "--overwrite", "true"]) == 0
    assert "121 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "verb"),
        (["build"], "Which recipe"),
        (["build", "/nowhere.yaml"], "/nowhere.yaml"),
        (["build", "RECIPE", "--shard_mbs", "3"], "did you mean `--shard_mb`"),
        (["build", "RECIPE", "--shard_mb", "0"], "greater than 0|> 0|above 0"),
        (["build", "RECIPE", "--tokenizer", "/nowhere"], "/nowhere does not exist"),
        (["paint", "RECIPE"], "invalid choice"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_2(recipe, tmp_path, capsys, words, message):
    assert main(["data", *(str(recipe) if word == "RECIPE" else word for word in words)]) == 2
    found = capsys.readouterr().err
    assert re.search(message, found), found
    assert not (tmp_path / "shards").exists()


def test_an_empty_corpus_and_a_file_that_is_not_utf8_are_explained(recipe, tmp_path, capsys):
    (tmp_path / "texts" / "a.txt").write_text("  \n")
    assert main(["data", "build", str(recipe), "--quiet"]) == 2
    assert "the corpus is empty" in capsys.readouterr().err
    (tmp_path / "texts" / "a.txt").write_bytes(b"good \xff")
    assert main(["data", "build", str(recipe), "--quiet", "--overwrite", "true"]) == 2
    assert "not UTF-8: byte 5" in capsys.readouterr().err


def test_the_example_recipe_is_sound():
    recipe = DataRecipe.load(Path(__file__).parents[2] / "recipes" / "data.yaml")
    assert recipe.sources[0].paths
