"""On-policy methods over two processes equal one: the same answers, rewards, advantages and weights."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.align.on_policy_cases import model_folder, prompt_file, rl_recipe
from tests.train.tiny_training import in_own_process

from hanlin.align.build import train
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics

pytestmark = pytest.mark.xdist_group("processes")
CASES = {
    "grpo": ("none", {}),
    "ppo": ("none", {}),
    "reinforce_pp_baseline": ("zero2", {}),
}


def part(rank: int, meeting: str, model: str, prompts: str, runs: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for kind, (shard, more) in CASES.items():
        recipe = rl_recipe(Path(model), Path(prompts), Path(runs), name=kind, kind=kind, train={"steps": 3}, **more)
        train(recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"shard": shard})}), quiet=True)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("ranks")
    model, prompts = model_folder(root / "model", tokenizer), prompt_file(root / "prompts.jsonl")
    arguments = (str(root / "meeting"), str(model), str(prompts), str(root / "two"))
    processes = [in_own_process(part, rank, *arguments) for rank in range(2)]
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    for kind, (_, more) in CASES.items():
        train(rl_recipe(model, prompts, root / "one", name=kind, kind=kind, train={"steps": 3}, **more), quiet=True)
    return root


@pytest.mark.parametrize("kind", CASES)
def test_two_processes_equal_one(trained, kind):
    """fp32: rewards and lengths of every round exactly, losses and norms within 1e-4."""
    one, two = (read_metrics(trained / name / kind / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-9) and a["answer/length"] == b["answer/length"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_weights_that_no_process_holds_whole_are_refused(trained, tmp_path):
    recipe = rl_recipe(trained / "model", trained / "prompts.jsonl", tmp_path)
    cut = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"shard": "zero3", "data": 1})})
    with pytest.raises(HanlinError, match=r"parallel\.shard"):
        train(cut, quiet=True)
