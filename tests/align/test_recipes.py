"""Every recipe loads, names what another one makes, and the stories run from end to end on a tiny model."""

import json
import re
import runpy
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from tests.align.on_policy_cases import model_folder, prompt_file, rl_recipe
from tests.test_readme import fenced_blocks

from hanlin.align.algorithms import ALGORITHMS
from hanlin.align.build import train
from hanlin.align.recipe import TrainRecipe
from hanlin.align.selection.recipe import SelectionRecipe
from hanlin.align.synthesis.recipe import SynthesisRecipe
from hanlin.cli import main
from hanlin.core.metrics import read_metrics
from hanlin.core.recipe import Recipe
from hanlin.data.recipe import DataRecipe

ROOT = Path(__file__).parents[2]
RECIPES = {str(file.relative_to(ROOT / "recipes")): file for file in sorted((ROOT / "recipes").rglob("*.yaml"))}
STORIES = {
    "instructgpt": ("1-sft", "2-reward", "3-ppo"),
    "r1": ("1-cold-start", "2-grpo", "3-rejection", "4-grpo"),
    "safety": ("1-sft", "2-dpo"),
}
QUICK = "--train.steps 2 --train.save_every 2 --train.device cpu --train.precision fp32 --train.lr 1e-4"
FEW = f"{QUICK} --objective.prompts_a_round 4 --objective.held_out_rows 4 --train.eval_every 2"


def class_of(file: Path) -> type[Recipe]:
    keys = yaml.safe_load(file.read_text(encoding="utf-8")).keys()
    for key, kind in (("objective", TrainRecipe), ("writer", SynthesisRecipe), ("method", SelectionRecipe)):
        if key in keys:
            return kind
    return DataRecipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_says_the_same_when_it_is_written(name, tmp_path):
    kind = class_of(RECIPES[name])
    recipe = kind.load(RECIPES[name], [])
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe.to_yaml(), encoding="utf-8")
    assert kind.load(written, []) == recipe
    called = getattr(recipe, "name", None)
    if called is not None:  # the run folder says which recipe it is of
        assert called == name.removesuffix(".yaml").removeprefix("align/").replace("/", "-")


@pytest.mark.parametrize("story", STORIES)
def test_each_stage_starts_from_the_one_before(story):
    found = [TrainRecipe.load(ROOT / "recipes/align" / story / f"{stage}.yaml", []) for stage in STORIES[story]]
    assert found[0].model.path == Path("runs/quickstart/7-sft/model")
    for before, after in pairwise(found):
        if after.objective.kind == "ppo":  # from the fine-tuned model, with the reward model beside it
            assert after.model.path == found[0].out / "model"
            assert after.objective.critic == before.out / "model" == after.objective.rewards[1].path
        else:
            assert after.model.path == before.out / "model"


def test_the_page_of_the_stories_has_their_commands_in_order():
    page = (ROOT / "recipes/align/README.md").read_text(encoding="utf-8")
    for story, stages in STORIES.items():
        named = re.findall(rf"hanlin train recipes/align/{story}/(\S+)\.yaml", page)
        assert [stage for stage in named if not stage.startswith("0")] == list(stages)
    for path in re.findall(r"recipes/[\w/.-]+\.(?:yaml|py)", page):
        assert (ROOT / path).exists(), path


def commands() -> list[str]:
    """`hanlin train` and `hanlin data problems` as the recipes and the pages about them show them."""
    pages = [ROOT / "docs/alignment.md", ROOT / "docs/on-policy.md", *(ROOT / "recipes/align").rglob("*.md")]
    texts = [file.read_text(encoding="utf-8") for file in [*pages, *(ROOT / "recipes/align").rglob("*.yaml")]]
    shown = [line for text in texts for line in re.findall(r"hanlin (?:train|data problems) [^`\n]+", text)]
    return sorted({line.split("   ")[0].strip() for line in shown if "RECIPE" not in line})


@pytest.mark.parametrize("line", commands())
def test_a_command_that_is_shown_is_one(line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, verb, what, *flags = shlex.split(line)
    if verb == "train":
        TrainRecipe.load(what, [flag for flag in flags if flag not in ("--nproc", "2")])
        return
    flags[flags.index("--out") + 1] = str(tmp_path)
    few = ["--train", "20", "--held-out", "2", "--worked", "2", "--answered", "2"]
    assert main(["data", "problems", *flags, *few]) == 0


def test_the_algorithm_and_the_reward_of_the_page_train(tmp_path, tokenizer, monkeypatch):
    page = (ROOT / "docs/alignment.md").read_text(encoding="utf-8")
    algorithm, reward = (block.text for block in fenced_blocks(page) if block.language == "python")
    monkeypatch.setattr("hanlin.align.algorithms.ALGORITHMS", dict(ALGORITHMS))
    monkeypatch.setattr("hanlin.align.on_policy_run.ALGORITHMS", sys.modules["hanlin.align.algorithms"].ALGORITHMS)
    exec(algorithm, {})
    (tmp_path / "page_rewards.py").write_text(reward, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = rl_recipe(
        model_folder(tmp_path / "model", tokenizer), prompt_file(tmp_path / "prompts.jsonl"), tmp_path,
        kind="on_policy", algorithm="against_best", train={"steps": 2},
        rewards=[{"kind": "number"}, {"kind": "function", "function": "page_rewards:short"}],
    )  # fmt: skip
    assert train(recipe, quiet=True).finished
    assert "against_best" not in ALGORITHMS


@pytest.fixture
def workplace(tmp_path, monkeypatch, tokenizer):
    """A folder with a random model where the stories look for the quickstart's."""
    model_folder(tmp_path / "runs/quickstart/7-sft/model", tokenizer, positions=256)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(name: str, *flags: str) -> dict:
    """Run one; the recipe's own values but for flags, and its last metrics."""
    recipe = TrainRecipe.load(ROOT / "recipes/align" / f"{name}.yaml", " ".join(flags).split())
    assert train(recipe, quiet=True).finished
    assert (recipe.out / "model" / "model.safetensors").exists()
    file = recipe.out / "metrics.jsonl"
    return {key: value for row in read_metrics(file) for key, value in row.items()} if file.exists() else {}


def problems(out: str, *flags: str) -> None:
    assert main(["data", "problems", "--out", out, "--train", "30", "--held-out", "6", *" ".join(flags).split()]) == 0


def script(name: str, *flags: str) -> None:
    """A program of the recipes, as `python NAME FLAGS` would run it."""
    before, sys.argv = sys.argv, [name, *flags]
    try:
        runpy.run_path(str(ROOT / "recipes/align" / name), run_name="__main__")
    finally:
        sys.argv = before


@pytest.mark.slow
def test_instructgpt_from_end_to_end(workplace):
    problems("runs/instructgpt-problems", "--kind sum --answered 20")
    stage("instructgpt/1-sft", QUICK)
    script("instructgpt/compare.py", "--prompts", "12")
    judged = [json.loads(line) for line in Path("runs/instructgpt-comparisons/pairs.jsonl").read_text().splitlines()]
    if not judged:  # two steps teach a random model no numbers: then the labellers have nothing to tell apart
        for name in ("pairs", "held-out"):
            rows = [{"prompt": f"What is {i} + 1?", "chosen": f"{i + 1}", "rejected": f"{i + 3}"} for i in range(12)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            Path(f"runs/instructgpt-comparisons/{name}.jsonl").write_text(lines)
    stage("instructgpt/2-reward", QUICK.replace("--train.steps 2", "--train.epochs 1"))
    assert Path("runs/instructgpt-2-reward/report.md").exists()
    told = stage("instructgpt/3-ppo", FEW, "--objective.critic_warmup 1")
    assert {"explained_variance", "eval/sampled", "reward/model"} <= told.keys()


@pytest.mark.slow
def test_r1_from_end_to_end(workplace):
    problems("runs/r1-problems", "--kind chain --largest 20 --worked 20")
    stage("r1/0-plain-sft", QUICK)
    stage("r1/1-cold-start", QUICK)
    told = stage("r1/2-grpo", FEW)
    assert {"reward/number", "reward/pattern", "eval/greedy"} <= told.keys()
    # a random model is never right: every answer is kept, so that there is something to learn
    stage(
        "r1/3-rejection", FEW.replace("--train.eval_every 2", ""), "--objective.threshold -1 --objective.max_tokens 8"
    )
    assert Path("runs/r1-3-rejection/report.md").exists()
    stage("r1/4-grpo", FEW)


@pytest.mark.slow
def test_a_safety_run_from_end_to_end(workplace):
    script("safety/make_pairs.py", "--out", "runs/safety-data")
    quick = QUICK.replace("--train.steps 2", "--train.steps 2 --train.epochs null")
    stage("safety/1-sft", quick)
    told = stage("safety/2-dpo", quick, "--train.eval_every 2 --objective.held_out_rows 2")
    assert {"rewards/accuracy", "eval/rewards/accuracy"} <= told.keys()


def test_what_the_safety_run_holds_out_is_asked_nowhere_else(tmp_path):
    script("safety/make_pairs.py", "--out", str(tmp_path))
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("chat", "pairs", "held-out")
    }
    trained = {row["prompt"] for row in rows["pairs"]} | {row["instruction"] for row in rows["chat"]}
    assert rows["held-out"] and not trained & {row["prompt"] for row in rows["held-out"]}
    assert all(row["chosen"] != row["rejected"] for row in rows["pairs"])
    for table in ("pairs", "held-out"):  # as many requests to refuse as to fulfil, in both languages
        chosen = [row["chosen"] for row in rows[table]]
        refused = [text for text in chosen if "would rather not" in text or "不想帮忙" in text]
        assert 2 * len(refused) == len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "dapo", "ppo", "rloo"])
def test_the_on_policy_recipes_run(workplace, name):
    problems("runs/sums", "--kind sum")
    assert "eval/sampled" in stage(f"{name}-tiny", FEW)


@pytest.mark.slow
def test_the_distillation_recipe_runs(workplace):
    Path("runs/quickstart/2-instructions").mkdir()
    problems("runs/sums", "--answered 20")
    Path("runs/sums/answered.jsonl").rename("runs/quickstart/2-instructions/instructions.jsonl")
    stage("distill-tiny", QUICK, "--train.epochs null --model.depth 1 --model.width 48")
