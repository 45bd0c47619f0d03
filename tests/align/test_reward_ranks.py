"""A reward model over two processes equals that of one."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.train.tiny_training import in_own_process

from hanlin.align.build import train
from hanlin.align.recipe import TrainRecipe
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics

pytestmark = pytest.mark.xdist_group("processes")
CASES = {"pairwise": "none", "process": "zero2"}


def recipe(form: str, shard: str, root: Path, runs: str) -> TrainRecipe:
    file = root / f"{form}.jsonl"
    return TrainRecipe.model_validate(
        {
            "name": form, "runs": root / runs, "tokenizer": root / "tokenizer", "parallel": {"shard": shard},
            "model": {
                "kind": "new", "family": "llama", "depth": 2, "width": 32, "heads": 2, "kv_heads": 1, "hidden": 48,
                "max_positions": 64, "tied": False,
            },
            "objective": {"kind": "reward", "form": form, "files": [file], "held_out": [file]},
            "train": {
                "steps": 4, "lr": 0.05, "batch_size": 4, "precision": "fp32", "device": "cpu", "log_every": 1,
                "optimizer": {"kind": "sgd"}, "eval_every": 2,
            },
        }
    )  # fmt: skip


def part(rank: int, meeting: str, root: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for form, shard in CASES.items():
        train(recipe(form, shard, Path(root), "two"), quiet=True)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("reward-ranks")
    tokenizer.save(root / "tokenizer")
    pairs = [{"prompt": f"{n}?", "chosen": "谢谢 " * (1 + n % 4), "rejected": f"add {n}"} for n in range(16)]
    steps = [{"prompt": f"{n}?", "steps": ["two"] * (1 + n % 3), "labels": [n % 2] * (1 + n % 3)} for n in range(16)]
    for form, rows in (("pairwise", pairs), ("process", steps)):
        (root / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    processes = [in_own_process(part, rank, str(root / "meeting"), str(root)) for rank in range(2)]
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    for form in CASES:
        train(recipe(form, "none", root, "one"), quiet=True)
    return root


@pytest.mark.parametrize("form", CASES)
def test_two_processes_equal_one(trained, form):
    """fp32, SGD: every weight, the head's too, within 1e-5; losses of the same rows within 1e-5."""
    one, two = (read_metrics(trained / name / form / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) and len(one) >= 4
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "eval/loss", "eval/accuracy"):
            assert (key in a) == (key in b)
            assert key not in a or a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5)
    for file in ("model.safetensors", "heads.safetensors"):
        first, second = (load_file(trained / name / form / "model" / file) for name in ("one", "two"))
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_a_head_that_no_process_would_save_is_refused(trained):
    cut = recipe("pairwise", "zero3", trained, "cut")
    with pytest.raises(HanlinError, match=r"parallel\.shard"):
        train(cut, quiet=True)
