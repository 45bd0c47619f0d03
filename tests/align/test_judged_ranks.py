"""Methods that learn from judged answers over two processes equal one: the reference, KTO's anchor, rounds and all."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.align.judged_runs import save_base, saved_weights, tiny_recipe, written
from tests.align.test_iterate import CHATS
from tests.align.test_kto import RANKED, UNPAIRED
from tests.align.test_preference import ROWS
from tests.train.tiny_training import in_own_process

from hanlin.align.adapter_choice import LoraChoice
from hanlin.align.build import train
from hanlin.align.iterate_recipe import IteratedObjective
from hanlin.align.preference_recipe import KtoObjective, PreferenceObjective, RrhfObjective
from hanlin.align.rahf_recipe import RahfObjective
from hanlin.align.recipe import TrainRecipe
from hanlin.core.metrics import read_metrics

pytestmark = pytest.mark.xdist_group("processes")
KINDS = ["dpo", "dpo_lora", "tdpo2", "kto", "rrhf", "rahf", "spin"]
ROUND = "round-1/run"  # of spin; what the second round writes may differ by a rounding of the first


def recipe_of(kind: str, root: Path, runs: str) -> TrainRecipe:
    files = {name: [root / f"{name}.jsonl"] for name in ("pairs", "unpaired", "ranked", "chats")}
    objective = {
        "dpo": lambda: PreferenceObjective(files=files["pairs"], held_out=files["pairs"]),
        "dpo_lora": lambda: PreferenceObjective(files=files["pairs"]),
        "tdpo2": lambda: PreferenceObjective(kind="tdpo2", files=files["pairs"]),
        "kto": lambda: KtoObjective(files=files["unpaired"], held_out=files["unpaired"]),
        "rrhf": lambda: RrhfObjective(files=files["ranked"]),
        "rahf": lambda: RahfObjective(files=files["pairs"], layers=[1], first_epochs=1),
        "spin": lambda: IteratedObjective(files=files["chats"], method="spin", rounds=2, max_tokens=8),
    }[kind]()
    adapter = LoraChoice(rank=4) if kind in ("dpo_lora", "rahf") else None
    choices = {"steps": 3, "lr": 1e-3, "log_every": 1}
    recipe = tiny_recipe(root, root / "base" / "model", objective, name=kind, adapter=adapter, **choices)
    return recipe.model_copy(update={"runs": root / runs})


def part(rank: int, meeting: str, root: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for kind in KINDS:
        train(recipe_of(kind, Path(root), "two"), quiet=True)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer_folder) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    save_base(root / "base", tokenizer_folder)
    for name, rows in (("pairs", ROWS), ("unpaired", UNPAIRED), ("ranked", RANKED), ("chats", CHATS)):
        written(root, rows, f"{name}.jsonl")
    processes = [in_own_process(part, rank, str(root / "meeting"), str(root)) for rank in range(2)]
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    for kind in KINDS:
        train(recipe_of(kind, root, "one"), quiet=True)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(trained, kind):
    """fp32: losses, norms, metrics and evaluations of every step within 1e-5, weights within 1e-4 of their size."""
    one, two = (trained / name / kind / (ROUND if kind == "spin" else ".") for name in ("one", "two"))
    rows = [read_metrics(run / "metrics.jsonl") for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) >= 3
    for a, b in zip(*rows, strict=True):
        for key in a.keys() - {"time", "tokens_per_s", "mfu"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    a, b = saved_weights(one), saved_weights(two)
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-4 * a[name].norm(), name
    if kind == "kto":
        assert any(row.get("kl") for row in rows[0]), "an anchor that is always 0 shows nothing"
