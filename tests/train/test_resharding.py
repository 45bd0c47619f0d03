"""A checkpoint knows no layout: saved on four processes, continued on one, two, four or eight in another one."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.train.layout_cases import make_trainer
from tests.train.test_layouts import compare
from tests.train.tiny_training import in_own_process

from hanlin.core.runs import Run

WORLDS = {"zero3": 4, "pp4-1f1b-tied": 4, "zero1-tp2-pp2": 8, "tp2": 2, "zero1": 4, "ep2-zero1": 4, "ddp-moe": 4}
PAIRS = [  # (saved in, continued in; None: one process)
    ("zero3", None), ("zero3", "tp2"), ("zero1", "zero3"), ("pp4-1f1b-tied", "zero1-tp2-pp2"),
    ("zero1-tp2-pp2", None), ("ep2-zero1", None), ("ddp-moe", "ep2-zero1"),
]  # fmt: skip


def part(rank: int, world: int, meeting: str, folder: str, name: str, steps: int) -> None:
    """One process of a run that goes on to `steps`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    make_trainer(name, Run(Path(folder)), steps=steps).fit()
    dist.destroy_process_group()


def run_to(steps: int, folder: Path, name: str) -> None:
    world = WORLDS[name]
    meeting = str(folder.parent / f"{folder.name}-{name}-{steps}")
    processes = [in_own_process(part, rank, world, meeting, str(folder), name, steps) for rank in range(world)]
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), PAIRS)
def test_a_run_goes_on_in_another_layout_as_if_nothing_had_happened(tmp_path, first, then):
    """fp64, 2 steps in one layout and 2 in another: losses and weights of one process within 1e-10."""
    Run.open(tmp_path / "cut")
    run_to(2, tmp_path / "cut", first)
    if then is None:
        make_trainer(first, Run(tmp_path / "cut"), layout=False, steps=4).fit()
    else:
        run_to(4, tmp_path / "cut", then)
    Run.open(tmp_path / "alone")
    make_trainer(first, Run(tmp_path / "alone"), layout=False, steps=2).fit()
    make_trainer(first, Run(tmp_path / "alone"), layout=False, steps=4).fit()
    compare(tmp_path / "cut", tmp_path / "alone", 1e-10, 1e-10)
    shutil.rmtree(tmp_path / "cut")
