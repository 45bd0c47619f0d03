"""A leader and its followers over gloo, with a toy step: same plans everywhere, clear errors, no rank that waits for
ever."""

import os
import signal
import time

import pytest
import torch.multiprocessing as multiprocessing
from tests.engine.rank_games import TIMEOUT, play

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

GOOD = {"numbers": [1.0, 2.0], "text": "你好 hello"}


def game(folder, plans, *, ranks=2, resume=()):
    """What each rank saw, a list of lines a rank; "" for one that left without a word; and the seconds until all had
    ended but those that hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hanlin.engine.ranks"])
    processes = [
        context.Process(target=play, args=(rank, ranks, str(folder / "meeting"), str(folder), plans))
        for rank in range(ranks)
    ]
    started = time.monotonic()
    for process in processes:
        process.start()
    for rank in sorted(range(ranks), key=lambda rank: rank in resume):
        if rank in resume:
            os.kill(processes[rank].pid, signal.SIGCONT)
        processes[rank].join(60)
        assert processes[rank].exitcode == 0, rank
    files = [folder / str(rank) for rank in range(ranks)]
    lines = [file.read_text(encoding="utf-8").split("\n") if file.exists() else [""] for file in files]
    return lines, time.monotonic() - started


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_runs_every_plan_and_stop_lets_them_return(tmp_path, ranks):
    big = {"numbers": [0.5] * 3, "text": "长" * 50_000}
    lines, _ = game(tmp_path, [GOOD, big, GOOD], ranks=ranks)
    times = ranks * (ranks + 1) / 2
    one, two = f"{[times, 2 * times]} 你好 hello", f"{[times / 2] * 3} {big['text']}"
    assert lines[0][:-1] == [one, two, one] and lines[0][-1].startswith("after stop: ")
    assert all(other == [one, two, one, "returned"] for other in lines[1:])


def test_an_idle_engine_is_none_that_hangs(tmp_path):
    lines, _ = game(tmp_path, [GOOD, 1.5 * TIMEOUT, GOOD])
    assert len(lines[0]) == 3 and len(lines[1]) == 3 and lines[1][-1] == "returned"


def test_an_error_of_a_step_is_raised_as_it_is_and_the_next_step_runs(tmp_path):
    lines, _ = game(tmp_path, [{"error": True}, GOOD])
    assert lines[0][0] == "ValueError 步骤 failed"
    assert lines[0][1] == lines[1][0] == "[3.0, 6.0] 你好 hello" and lines[1][1] == "returned"


def test_a_follower_that_dies_is_a_clear_error_at_this_and_every_later_call(tmp_path):
    lines, _ = game(tmp_path, [GOOD, {**GOOD, "dies": 1}, GOOD])
    assert all(line.startswith("HanlinError A rank of this engine is gone") for line in lines[0][1:3])


def test_a_leader_that_dies_is_a_clear_error_on_the_others(tmp_path):
    lines, _ = game(tmp_path, [GOOD, {**GOOD, "dies": 0}], ranks=3)
    for other in lines[1:]:
        assert other[0].startswith("[6.0") and other[-1].startswith("HanlinError A rank of this engine is gone")


@pytest.mark.parametrize("hangs", [0, 1])
def test_a_rank_that_hangs_is_given_up_after_the_timeout(tmp_path, hangs):
    """The other one ends by itself while this one is stopped (SIGSTOP)."""
    lines, seconds = game(tmp_path, [GOOD, {**GOOD, "hangs": hangs}], resume=(hangs,))
    assert "HanlinError A rank of this engine is gone" in "\n".join(lines[1 - hangs])
    assert TIMEOUT <= seconds < 30
