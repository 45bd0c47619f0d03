"""Two real processes that keep the checkpoints of one run: they agree on what is there and on what went wrong."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_training import in_own_process

from hanlin.core.errors import HanlinError
from hanlin.core.runs import Run
from hanlin.parallel.processes import Processes
from hanlin.train import checkpoint as checkpoint_file
from hanlin.train.checkpoint import Checkpoint
from hanlin.train.keeper import Keeper
from hanlin.train.reader import open_checkpoint
from hanlin.train.sharded import Held
from hanlin.train.tensor_file import write_tensors

WHOLE = torch.arange(10.0)


def saved(step, rank, *, shared=True):
    """Each process holds a half of `w`, or both hold all of it."""
    span = (rank * 5, rank * 5 + 5) if shared else None
    tensor = (WHOLE + step)[slice(*span)] if span else WHOLE + step
    return Checkpoint({"step": step}, [Held("weights/w", tensor, (10,), (), span)])


def told(action):
    """What a call says, as a line."""
    try:
        found = action()
    except (HanlinError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "None" if found is None else f"step {found.step}: {found.whole('weights/w').tolist()}"


def full(path, tensors):
    return write_tensors("/dev/full", tensors)


def tell(rank: int, folder: str, meeting: str, case: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    keeping = Keeper(Run.open(folder), Processes.here(), keep_last=2, notice=print, background=case != "at once")
    lines = []
    if case in ("shared", "at once", "copies"):
        for step in (1, 2, 3):
            keeping.save(saved(step, rank, shared=case != "copies"), None)
        lines = [told(keeping.newest)]
    if case == "full disk":
        keeping.save(saved(1, rank), None)
        keeping.finish()
        if rank == 1:
            checkpoint_file.write_tensors = full
        lines = [told(lambda: keeping.save(saved(2, rank), None)), told(keeping.finish), told(keeping.newest)]
    if case == "damaged":
        for step in (1, 2):
            keeping.save(saved(step, rank), None)
        keeping.finish()
        if rank == 0:
            Path(folder, "checkpoints", "step-2", "rank-1.safetensors").write_bytes(b"torn")
        lines = [told(keeping.newest)]
    if case == "elsewhere":  # the second machine has a disk of its own
        keeping.save(saved(1, rank), None)
        keeping.finish()
        if rank == 1:
            keeping.run = Run.open(folder + "-elsewhere")
        lines = [told(keeping.newest)]
    if case == "nothing":
        lines = [told(keeping.newest)]
    Path(folder, f"{rank}.txt").write_text("\n".join(lines))
    dist.destroy_process_group()


def run(tmp_path, case):
    """What the two processes told, line by line."""
    folder = tmp_path / "run"
    Run.open(folder)
    processes = [in_own_process(tell, rank, str(folder), str(tmp_path / "meeting"), case) for rank in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert not list((folder / "checkpoints").glob(".partial-*"))
    return folder, [(folder / f"{rank}.txt").read_text().splitlines() for rank in range(2)]


@pytest.mark.parametrize("case", ["shared", "at once"])
def test_halves_are_kept_as_a_file_each(tmp_path, case):
    folder, said = run(tmp_path, case)
    assert said == [[f"step 3: {(WHOLE + 3).tolist()}"]] * 2
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == ["step-2", "step-3"]
    assert (folder / "checkpoints" / "step-3" / "rank-1.safetensors").is_file()


def test_copies_are_kept_as_the_files_that_anybody_reads(tmp_path):
    folder, said = run(tmp_path, "copies")
    assert said == [[f"step 3: {(WHOLE + 3).tolist()}"]] * 2
    assert (folder / "checkpoints" / "step-3" / "model.safetensors").is_file()


def test_a_full_disk_of_one_is_told_by_both_and_the_old_checkpoint_lives(tmp_path):
    _, (first, second) = run(tmp_path, "full disk")
    assert first[0] == second[0] == "None"
    assert first[1].startswith("HanlinError: The checkpoint was given up: process 1 did not write its part.")
    assert second[1].startswith("HanlinError: The disk is full") and "step-2" in second[1]
    assert first[2] == second[2] == f"step 1: {(WHOLE + 1).tolist()}"


def test_both_pass_over_a_damaged_one(tmp_path):
    folder, said = run(tmp_path, "damaged")
    assert said == [[f"step 1: {(WHOLE + 1).tolist()}"]] * 2
    assert (folder / "checkpoints" / "damaged-step-2").is_dir()


def test_a_folder_that_one_does_not_see_is_explained_to_both(tmp_path):
    _, (first, second) = run(tmp_path, "elsewhere")
    assert "must lie where all machines of the run see it" in second[0]
    assert first[0].startswith("HanlinError: Process 1 of this run:") and "all machines" in first[0]


def test_a_new_run_has_none(tmp_path):
    assert run(tmp_path, "nothing")[1] == [["None"], ["None"]]


def test_what_two_wrote_one_reads(tmp_path):
    folder, _ = run(tmp_path, "shared")
    assert torch.equal(open_checkpoint(folder / "checkpoints" / "step-2").whole("weights/w"), WHOLE + 2)
