"""However a run was cut off, it ends with the weights and the lines of the uninterrupted one."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_training import (
    TinySource,
    assert_same_bits,
    evaluate,
    in_own_process,
    in_this_process,
    tiny_model,
    train,
    weights,
)

from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run
from hanlin.train.reader import open_checkpoint

CLOCK = ("time", "tokens_per_s", "mfu")  # of a line, what may differ


def lines(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(folder / "metrics.jsonl")]


def signalled_at(when: int, number: signal.Signals = signal.SIGTERM):
    """An evaluation that, after step `when`, lets this process get a signal."""

    def look(model, step):
        if step == when:
            signal.raise_signal(number)
        return evaluate(model, step)

    return look


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_signal_saves_and_the_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, optimizer, number):
    """Mid-epoch, between two log lines, with accumulation, a schedule and an evaluation that draws chance."""
    settings = {
        "epochs": 2, "eval_every": 5, "micro_batch_size": 2, "optimizer": {"kind": optimizer}, "clip": 0.5,
    }  # fmt: skip
    data = TinySource(8, steps_per_epoch=7)
    whole = train(tmp_path / "whole", settings, data=data)
    cut = train(tmp_path / "cut", settings, data=data, evaluate=signalled_at(5, number))
    assert (cut.step, cut.finished) == (5, False)
    assert [step for step, _ in Run.open(tmp_path / "cut").checkpoints()] == [5]
    again = train(tmp_path / "cut", settings, data=data, model=tiny_model(seed=7))  # its weights are replaced
    assert (again.step, again.finished) == (14, True)
    assert_same_bits(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert {k: v for k, v in again.metrics.items() if k not in CLOCK} == {
        k: v for k, v in whole.metrics.items() if k not in CLOCK
    }


def test_the_signals_are_given_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    train(None, {"steps": 6, "eval_every": 2}, evaluate=signalled_at(2, signal.SIGINT))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    def stubborn(model, step):
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not reached")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, {"steps": 6, "eval_every": 2}, evaluate=stubborn)
    assert Run.open(tmp_path).checkpoints() == []


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = train(tmp_path, {"steps": 4})
    model = tiny_model(seed=3)
    second = train(tmp_path, {"steps": 4}, model=model)
    assert second == first
    assert_same_bits(dict(model.named_parameters()), weights(tmp_path))


def test_lines_written_after_the_checkpoint_are_not_written_twice(tmp_path):
    """A run that dies between two checkpoints has logged steps it must make again."""

    def die(model, step):
        if step == 7:
            raise RuntimeError("power cut")
        return {}

    settings = {"steps": 10, "save_every": 4, "log_every": 1, "eval_every": 7}
    with pytest.raises(RuntimeError):
        train(tmp_path, settings, evaluate=die)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    train(tmp_path, settings)
    trained = [row["step"] for row in lines(tmp_path) if "loss" in row]
    assert trained == list(range(1, 11))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lr": 0.02}, r"train\.lr was 0\.01, now 0\.02"),
        ({"clip": None}, r"train\.clip was 1\.0, now None"),
        ({"precision": "bf16"}, r"train\.precision was 'fp32', now 'bf16'"),
        ({"optimizer": {"kind": "adamw", "betas": [0.9, 0.99]}}, r"train\.optimizer\.betas\.1 was 0\.95, now 0\.99"),
        ({"schedule": {"kind": "wsd"}}, r"train\.schedule\.decay was absent, now 0\.3"),
        ({"steps": 9}, "a run of 6 steps, now it is 9"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"data": TinySource(8, seed=4)}, r"data\.seed was 0, now 4"),
        ({"model": tiny_model(tied=True)}, r"model\.config\.tied_embeddings was False, now True"),
        ({"model": tiny_model().requires_grad_(False)}, "no trainable"),
    ],
)
def test_what_would_change_the_trajectory_is_refused_by_name(tmp_path, change, field):
    train(tmp_path, {"steps": 6}, evaluate=None)
    rest = {k: change.pop(k) for k in ("seed", "data", "model") if k in change}
    before = weights(tmp_path)
    with pytest.raises(HanlinError, match=field):
        train(tmp_path, {"steps": 6, **change}, **rest)
    assert_same_bits(weights(tmp_path), before)


def test_what_changes_nothing_may_change(tmp_path):
    train(tmp_path / "one", {"steps": 6, "save_every": 3, "keep_last": 5})
    (tmp_path / "two" / "checkpoints").mkdir(parents=True)
    (tmp_path / "one/checkpoints/step-3").replace(tmp_path / "two/checkpoints/step-3")
    train(
        tmp_path / "two", {"steps": 6, "log_every": 1, "eval_every": 6, "precision": "auto"}, evaluate=lambda m, s: {}
    )
    assert_same_bits(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_a_constant_rate_can_go_on_longer_as_if_it_had_always_been_meant_to(tmp_path):
    constant = {"schedule": {"kind": "constant"}}
    train(tmp_path / "longer", {"steps": 4, **constant})
    train(tmp_path / "longer", {"steps": 9, **constant})
    train(tmp_path / "whole", {"steps": 9, **constant})
    assert_same_bits(weights(tmp_path / "longer"), weights(tmp_path / "whole"))


KILLED = {"steps": 60, "save_every": 1, "eval_every": 4, "micro_batch_size": 4, "optimizer": {"kind": "muon"}}


@pytest.fixture
def one_thread():
    """As in the children: the order of a sum depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wait_for_life(folder: Path, process) -> None:
    """Until the child trains: its metrics file is there (it is made before the first step)."""
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists():
        assert process.exitcode is None and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_never_tears_and_always_ends_in_the_same_weights(tmp_path, one_thread):
    """Two kills to a run, ten runs or more: the second strikes the resumed one. Each step writes a checkpoint. On a
    busy machine a kill may come too late; then further runs are killed, until ten were struck midway."""
    chance = random.Random(20)
    whole = tmp_path / "whole"
    in_own_process(in_this_process, str(whole), KILLED).join()
    spent = read_metrics(whole / "metrics.jsonl")[-1]["time"]
    expected, midway = weights(whole), 0
    for trial in range(30):
        if trial >= 10 and midway >= 10:
            break
        folder = tmp_path / f"trial-{trial}"
        for _ in range(2):
            (folder / "metrics.jsonl").unlink(missing_ok=True)  # a sign of life; the steps' lines are not at stake here
            process = in_own_process(in_this_process, str(folder), KILLED)
            wait_for_life(folder, process)
            time.sleep(chance.uniform(0, 0.6 * spent))
            process.kill()
            process.join()
            there = Run.open(folder).checkpoints()
            for _, checkpoint in there:
                open_checkpoint(checkpoint)  # raises if one byte is not what was meant
            midway += process.exitcode == -signal.SIGKILL and 0 < (there[-1][0] if there else 0) < KILLED["steps"]
        train(folder, KILLED)
        assert_same_bits(weights(folder), expected)
    assert midway >= 10, f"only {midway} of 60 kills struck a training in progress"


def test_sigterm_from_outside_saves_before_leaving(tmp_path):
    process = in_own_process(in_this_process, str(tmp_path), {"steps": 100_000})
    wait_for_life(tmp_path, process)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0
    ((step, folder),) = Run.open(tmp_path).checkpoints()
    assert 0 < step < 100_000 and open_checkpoint(folder).step == step
