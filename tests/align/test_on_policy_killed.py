"""`kill -9` anywhere in an on-policy run: the run that goes on ends with the very same weights."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.align.on_policy_cases import model_folder, prompt_file, rl_recipe

from hanlin.align.build import train
from hanlin.core.files import write_text
from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run
from hanlin.train.reader import open_checkpoint

pytestmark = pytest.mark.slow
STEPS = 24


def test_killed_five_times_it_ends_where_it_would_have(tmp_path, tokenizer):
    """PPO, two passes over two minibatches (four steps a round), adaptive divergence: prompts' order, answers,
    reference, critic, optimiser and beta go on; weights and metrics equal the undisturbed run's bit for bit."""
    model, prompts = model_folder(tmp_path / "model", tokenizer), prompt_file(tmp_path / "prompts.jsonl")
    chosen = {"steps": STEPS, "batch_size": 3, "save_every": 1, "keep_last": 3, "schedule": {"kind": "constant"}}
    more = {"epochs": 2, "adaptive_kl": {"target": 0.05, "horizon": 60}}
    whole, killed = (
        rl_recipe(model, prompts, tmp_path, name=name, kind="ppo", train=chosen, **more) for name in ("whole", "killed")
    )
    train(whole, quiet=True)
    write_text(tmp_path / "recipe.yaml", killed.to_yaml())
    chance, kills = random.Random(5), 0
    for _ in range(40):
        process = start(tmp_path / "recipe.yaml")
        before = last_step(killed.out)
        if kills < 5:
            deadline = time.monotonic() + 120
            while last_step(killed.out) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.15))
        else:
            process.wait(300)
        if process.poll() is not None:
            assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3, "the machine was too fast for the kills"
    one, other = (open_checkpoint(Run(recipe.out).checkpoints()[-1][1]) for recipe in (whole, killed))
    assert one.state["source"] == other.state["source"]
    for name in one.names():
        assert torch.equal(one.whole(name), other.whole(name)), name
    rows = [read_metrics(recipe.out / "metrics.jsonl") for recipe in (whole, killed)]
    for a, b in zip(*rows, strict=True):
        for key in ("step", "loss", "grad_norm", "reward", "kl/answer", "beta"):
            assert a.get(key) == b.get(key), (key, a["step"])


def start(recipe: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "hanlin", "train", str(recipe), "--quiet"]
    with (recipe.parent / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def last_step(folder: Path) -> int:
    if not folder.exists():
        return 0
    return max((step for step, _ in Run(folder).checkpoints()), default=0)
