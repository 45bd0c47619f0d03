"""What the pages say about recipes is true: each YAML block is a part of one, and each named flag and file exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.test_readme import fenced_blocks

from hanlin.align.recipe import TrainRecipe

ROOT = Path(__file__).parent.parent
PAGES = (
    "docs/recipes.md",
    "docs/parallel.md",
    "docs/training.md",
    "docs/sft.md",
    "docs/alignment.md",
    "docs/on-policy.md",
    "docs/preferences.md",
    "docs/rewards.md",
    "docs/selection.md",
    "docs/synthesis.md",
    "docs/health.md",
    "docs/rl.md",
    "recipes/align/README.md",
)
REST = {
    "name": "page",
    "tokenizer": "tokenizer",
    "model": {"kind": "new"},
    "objective": {"kind": "causal_lm", "shards": [{"path": "shards"}]},
}
BLOCKS = [
    pytest.param(block.text, id=f"{page}:{block.line}")
    for page in PAGES
    for block in fenced_blocks((ROOT / page).read_text(encoding="utf-8"))
    if block.language == "yaml"
]


@pytest.mark.parametrize("text", BLOCKS)
def test_every_yaml_block_is_a_part_of_a_recipe(text, tmp_path):
    """Completed by what the page does not speak of, it loads, and says the same when it is written and read again."""
    told = yaml.safe_load(text)
    assert told.keys() <= TrainRecipe.model_fields.keys()
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**REST, **told}), encoding="utf-8")
    recipe = TrainRecipe.load(file, [])
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert TrainRecipe.load(file, []) == recipe


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "recipes").glob("*.yaml") if p.name != "data.yaml"))
def test_every_training_recipe_loads(path):
    assert TrainRecipe.load(ROOT / "recipes" / path, []).name == path.removesuffix(".yaml")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_is_a_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:src|recipes|benchmarks|docs)/[\w/.-]+)`", text)
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_the_flags_of_the_pages_are_flags_of_the_command():
    """`--nproc`, `--find-lr`, `--restarts` and every `--train.…`, `--parallel.…`, `--objective.…` that a page names."""
    listed = subprocess.run(
        [sys.executable, "-m", "hanlin", "train", "recipes/pretrain-tiny.yaml", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    own = subprocess.run(
        [sys.executable, "-m", "hanlin", "train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for flag in re.findall(r"--(?:nproc|restarts|find-lr)\b", text):
            assert flag in own, (page, flag)
        for flag in re.findall(r"(?<!no-)--((?:train|parallel)\.[a-z_]+)", text):
            assert f"--{flag}" in listed or f"--{flag.replace('_', '-')}" in listed, (page, flag)
