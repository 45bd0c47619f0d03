"""Writing while training goes on: what is written is the moment of the save, and nothing that goes wrong is lost."""

import os
import signal
import threading
import time

import pytest
import torch
from tiny_training import in_own_process

from hanlin.core.errors import HanlinError
from hanlin.core.runs import Run
from hanlin.parallel.processes import Processes
from hanlin.train import keeper as keeper_file
from hanlin.train.background import BackgroundWriter, HostCopies
from hanlin.train.checkpoint import Checkpoint, newest_checkpoint
from hanlin.train.keeper import Keeper
from hanlin.train.sharded import Held
from hanlin.train.tensor_file import write_tensors


def keeper(folder, **settings):
    return Keeper(
        Run.open(folder), Processes.here(), **{"keep_last": 2, "notice": print, "background": True} | settings
    )


def checkpoint(step, weights):
    return Checkpoint({"step": step}, [Held("weights/w", weights, tuple(weights.shape))])


def steps_of(folder):
    return [step for step, _ in Run.open(folder).checkpoints()]


def test_a_checkpoint_holds_the_moment_of_its_save_though_training_goes_on(tmp_path):
    weights = torch.zeros(1_000_000)
    with keeper(tmp_path, keep_last=9) as keeping:
        for step in range(1, 6):
            weights.fill_(step)
            keeping.save(checkpoint(step, weights), None)
            weights.fill_(-1.0)
    for step, folder in Run.open(tmp_path).checkpoints():
        found = newest_checkpoint(Run.open(tmp_path), pytest.fail) if step == 5 else None
        assert found is None or found.folder == folder
        values = keeper_file.open_checkpoint(folder).whole("weights/w")
        assert values.unique().tolist() == [step]
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_a_save_in_flight_does_not_hold_the_loop_and_the_next_one_waits(tmp_path, monkeypatch):
    """A disk that is stopped by hand: the first save returns, the second does not until the disk goes on."""
    disk, writes = threading.Event(), []

    def slow(*arguments):
        disk.wait(30)
        writes.append(time.monotonic())
        write(*arguments)

    write = keeper_file.write_checkpoint
    monkeypatch.setattr(keeper_file, "write_checkpoint", slow)
    with keeper(tmp_path) as keeping:
        keeping.save(checkpoint(1, torch.ones(3)), None)
        assert steps_of(tmp_path) == [] and not writes  # it came back before the file was there
        threading.Timer(0.3, disk.set).start()
        keeping.save(checkpoint(2, torch.ones(3)), None)
        assert len(writes) >= 1
    assert steps_of(tmp_path) == [1, 2]


def test_only_the_last_and_the_best_are_kept(tmp_path):
    with keeper(tmp_path, keep_last=2) as keeping:
        for step in range(1, 7):
            keeping.save(checkpoint(step, torch.ones(3)), 2 if step >= 2 else None)
    assert steps_of(tmp_path) == [2, 5, 6]


def test_the_copies_use_their_memory_again():
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(4), "c": torch.tensor(2.0), "view": torch.randn(6, 4).T}
    copies = HostCopies()
    first = copies.take(tensors)
    places = {name: copy.data_ptr() for name, copy in first.items()}
    tensors["a"].add_(1)
    second = copies.take(tensors)
    assert {name: copy.data_ptr() for name, copy in second.items()} == places
    assert all(torch.equal(second[name], tensors[name]) for name in tensors)
    assert copies.bytes == 5 * 3 * 4 + 4 * 8 + 4 + 6 * 4 * 4
    assert copies.take({"a": torch.randn(2)})["a"].shape == (2,) and copies.bytes == 8  # what is gone is given back


@pytest.mark.parametrize("when", ["next save", "end"])
def test_a_full_disk_is_told_at_the_next_save_or_at_the_end_and_the_old_checkpoint_lives(tmp_path, monkeypatch, when):
    """/dev/full is a disk without space: the kernel itself answers the writes with ENOSPC."""
    keeping = keeper(tmp_path)
    keeping.save(checkpoint(1, torch.ones(3)), None)
    keeping.finish()
    monkeypatch.setattr(
        "hanlin.train.checkpoint.write_tensors", lambda path, tensors: write_tensors("/dev/full", tensors)
    )
    keeping.save(checkpoint(2, torch.ones(3)), None)
    with pytest.raises(HanlinError, match=r"disk is full: .*step-2 .*Nothing that was there before is lost"):
        if when == "end":
            keeping.finish()
        else:
            keeping.save(checkpoint(3, torch.ones(3)), None)
    monkeypatch.undo()
    assert steps_of(tmp_path) == [1]
    keeping.save(checkpoint(3, torch.ones(3)), None)  # an error is told once
    keeping.finish()
    assert steps_of(tmp_path) == [1, 3]


def test_a_loop_that_fails_leaves_its_last_save_whole_and_its_own_error(tmp_path):
    with pytest.raises(ValueError, match="the loop"), keeper(tmp_path) as keeping:
        keeping.save(checkpoint(1, torch.ones(100_000)), None)
        raise ValueError("the loop")
    assert steps_of(tmp_path) == [1]


def save_for_ever(folder: str) -> None:
    torch.set_num_threads(1)
    weights = torch.zeros(2_000_000)
    keeping = keeper(folder)
    for step in range(1, 10_000):
        weights.fill_(step)
        keeping.save(checkpoint(step, weights), None)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_in_the_middle_of_a_write_the_one_before_is_whole(tmp_path):
    """Eight times, at another moment each; every checkpoint that is there afterwards holds what it should."""
    caught = 0
    for number in range(8):
        folder = tmp_path / str(number)
        process = in_own_process(save_for_ever, str(folder))
        end = time.monotonic() + 60
        while not list((folder / "checkpoints").glob("step-*")):
            assert time.monotonic() < end
            time.sleep(0.005)
        time.sleep(0.01 * number)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(30)
        caught += bool(list((folder / "checkpoints").glob(".partial-*")))
        for step, checkpoint_folder in Run.open(folder).checkpoints():
            values = keeper_file.open_checkpoint(checkpoint_folder).whole("weights/w")
            assert values.unique().tolist() == [step]
        assert newest_checkpoint(Run.open(folder), pytest.fail) is not None
    assert caught > 0  # some died in the middle of one


def test_a_writer_refuses_a_second_job_and_tells_an_error_once():
    writer = BackgroundWriter()
    writer.submit(lambda: (_ for _ in ()).throw(KeyError("lost")))
    with pytest.raises(RuntimeError, match="in flight"):
        writer.submit(lambda: None)
    assert isinstance(writer.wait(), KeyError)
    assert writer.wait() is None
