"""Every `hanlin data synthesize` and `select` that a page, the help or a recipe shows is a command that loads."""

import re
import shlex
from pathlib import Path

import pytest

from hanlin.align.selection.recipe import SelectionRecipe
from hanlin.align.synthesis.recipe import SynthesisRecipe
from hanlin.cli import data

ROOT = Path(__file__).parents[2]
RECIPES = {"synthesize": SynthesisRecipe, "select": SelectionRecipe}
OWN = [*(ROOT / "recipes/align").glob("select-*.yaml"), *(ROOT / "docs").glob("s[ey]*.md")]
OWN += [ROOT / f"recipes/align/{name}.yaml" for name in ("self-instruct", "evol-instruct", "rejection")]


def commands() -> list[str]:
    texts = [file.read_text(encoding="utf-8").replace("\\\n", " ") for file in OWN]
    shown = [
        found for text in texts for found in re.findall(r"hanlin data (?:synthesize|select) recipes/[^`|\n]+", text)
    ]
    return sorted({line.split("   ")[0].strip() for line in [*shown, *data.SYNTHESIZE, *data.SELECT]})


@pytest.mark.parametrize("line", [line for line in commands() if not line.endswith("--help")])
def test_a_command_that_is_shown_loads(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, _, verb, recipe, *flags = shlex.split(line)
    loaded = RECIPES[verb].load(recipe, flags)
    assert RECIPES[verb].model_validate(loaded.model_dump()) == loaded


def test_there_are_commands_of_both_kinds():
    assert {line.split()[2] for line in commands()} == {"synthesize", "select"} and len(commands()) >= 12
