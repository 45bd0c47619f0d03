"""Several processes of one command: started together, ended together, started again when one is lost.

The job is `toy_job.py`: it joins, saves in the background and continues as the trainer does. Weights are compared with
those of one process: another order of the fp64 sums is the only difference, so 1e-12. At the end `hanlin train` itself.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from toy_job import result

from hanlin.core.errors import HanlinError
from hanlin.core.launch import free_port, launch, share_of_cores
from hanlin.core.runs import Run
from hanlin.parallel.joining import Seat, _fresh_corner, first_host
from hanlin.train.reader import open_checkpoint

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

JOB = [sys.executable, str(Path(__file__).with_name("toy_job.py"))]
LAUNCH = "import sys; from hanlin.core.launch import launch; sys.exit(launch(sys.argv[3:], int(sys.argv[1]), logs=sys.argv[2]))"  # noqa: E501


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights that one process finds in 12 steps."""
    folder = tmp_path_factory.mktemp("alone")
    subprocess.run([*JOB, folder, "12", "--save-every", "4"], check=True, timeout=120)
    return result(folder)


def started(folder, nproc, *flags, **settings):
    """Saved every two steps: who dies at step 7 was past the save of step 6, which waited for that of step 4."""
    return launch([*JOB, str(folder), "12", "--save-every", "2", *flags], nproc, logs=folder / "logs", **settings)


def assert_equal(folder, alone):
    assert (result(folder) - alone).abs().max() <= 1e-12 * alone.abs().max()


def test_two_processes_equal_one_and_the_first_alone_is_heard(tmp_path, alone, capfd):
    assert started(tmp_path, 2) == 0
    assert_equal(tmp_path, alone)
    assert capfd.readouterr().out == "done\n"
    assert (tmp_path / "logs" / "rank-1.log").read_text() == ""


def test_a_checkpoint_of_three_processes_continues_on_one_and_on_two(tmp_path, alone):
    assert launch([*JOB, str(tmp_path), "6", "--save-every", "3"], 3, logs=tmp_path / "logs") == 0
    (tmp_path / "weights.json").unlink()
    assert open_checkpoint(tmp_path / "checkpoints" / "step-6").world == 3
    assert launch([*JOB, str(tmp_path), "9", "--save-every", "3"], 1, logs=tmp_path / "logs") == 0
    newest = tmp_path / "checkpoints" / "step-9"
    assert (newest / "model.safetensors").is_file()  # one process writes whole files
    assert started(tmp_path, 2) == 0
    assert_equal(tmp_path, alone)


def test_a_killed_process_is_started_again_with_the_others_and_the_result_is_the_same(tmp_path, alone, capfd):
    assert started(tmp_path, 3, "--hurt", "1:7:kill") == 0
    assert_equal(tmp_path, alone)
    said = capfd.readouterr()
    assert "Process 1 was killed by SIGKILL; all 3 processes start again from the last checkpoint (1 of 3" in said.err
    from_step = re.findall(r"rank 0 continues from (\d)", said.out)
    assert from_step in (["4"], ["6"])
    assert f"rank 1 continues from {from_step[0]}" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert not [f for f in (tmp_path / "checkpoints").iterdir() if f.name.startswith(".")]


@pytest.mark.slow
def test_who_is_killed_again_and_again_is_given_up(tmp_path, capfd):
    assert started(tmp_path, 2, "--hurt", "1:7:kill*", restarts=1) == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    assert "(1 of 1 restarts)" in said and "given up after 1 restarts" in said
    assert Run.open(tmp_path).checkpoints()[-1][0] in (4, 6)


@pytest.mark.parametrize("hurt", [["1:3:mistake"], ["0:3:mistake", "1:3:mistake"]])
def test_an_explained_mistake_is_printed_once_and_not_tried_again(tmp_path, hurt, capfd):
    assert started(tmp_path, 2, "--hurt", *hurt) == 2
    said = capfd.readouterr().err
    assert said.count("The recipe is wrong.") == 1 and "start again" not in said


def test_a_bug_shows_the_end_of_its_log_and_is_tried_again(tmp_path, alone, capfd):
    assert started(tmp_path, 2, "--hurt", "1:3:bug") == 0
    said = capfd.readouterr().err
    assert "KeyError: 'bug'" in said and "Process 1 ended with exit code 1; all 2 processes start again" in said
    assert_equal(tmp_path, alone)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_is_passed_on_so_that_all_save_and_end(tmp_path, number, alone):
    command = [*JOB, str(tmp_path), "12", "--save-every", "100", "--pause", "0.2"]
    parent = subprocess.Popen([sys.executable, "-c", LAUNCH, "2", str(tmp_path / "logs"), *command])
    wait_for_start(tmp_path, 2)
    parent.send_signal(number)
    assert parent.wait(120) == 0
    steps = [step for step, _ in Run.open(tmp_path).checkpoints()]
    assert len(steps) == 1 and 0 <= steps[0] < 12
    assert f"rank 1 stopped at {steps[0]}" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert started(tmp_path, 2) == 0
    assert_equal(tmp_path, alone)


def test_workers_do_not_outlive_their_launcher(tmp_path):
    command = [*JOB, str(tmp_path), "100000", "--save-every", "100000", "--pause", "0.2"]
    parent = subprocess.Popen([sys.executable, "-c", LAUNCH, "2", str(tmp_path / "logs"), *command])
    workers = wait_for_start(tmp_path, 2)
    parent.kill()
    parent.wait(60)
    until(lambda: not any(running(worker) for worker in workers))
    assert len(Run.open(tmp_path).checkpoints()) == 1  # they saved


def wait_for_start(folder, nproc):
    """Until all handle signals; their process ids."""
    files = [folder / f"begun-{rank}" for rank in range(nproc)]
    until(lambda: all(file.exists() for file in files))
    return [int(file.read_text()) for file in files]


def running(process):
    """Not gone, and not a child that nobody has asked after yet."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(true, seconds=120.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def torchrun(node, port, folder, log, *flags):
    """One of two agents of torch's launcher, each with two workers: a machine of its own as far as they know."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"),
                *("--local-addr", "127.0.0.1", "--max-restarts", "2"),
                *(JOB[1], str(folder), "12", "--save-every", "2", *flags),
            ],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--hurt", "3:7:kill"]])
def test_two_machines_under_torchrun_equal_one_process(tmp_path, flags, alone):
    """Also after a worker of one of them was lost: torchrun starts all four again, and they continue."""
    port, logs = free_port(), [tmp_path / f"agent-{node}.log" for node in range(2)]
    with ExitStack() as stack:
        agents = [torchrun(node, port, tmp_path / "run", logs[node], *flags) for node in range(2)]
        for agent in agents:
            stack.callback(agent.terminate)  # it ends its workers
        assert [agent.wait(240) for agent in agents] == [0, 0], logs[0].read_text()[-3000:]
    assert_equal(tmp_path / "run", alone)
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / "step-12").world == 4
    assert ("rank 0 continues from" in logs[0].read_text() + logs[1].read_text()) == bool(flags)


def test_each_try_of_torchrun_meets_in_a_corner_of_its_own():
    """The store outlives the tries. In the second one process died before it met the others, and left its question."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def meet(number):
        def one(rank):
            corner = _fresh_corner(Seat(rank, 3, rank, 3, "127.0.0.1", store.port), timedelta(seconds=60))
            if rank == 0:
                corner.set("try", number)
            return corner.get("try").decode()

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(one, range(3)))

    assert meet("first") == ["first"] * 3
    store.set("hanlin/question-2", "of one that died")
    assert meet("second") == ["second"] * 3


def test_a_place_is_read_from_torchrun_slurm_and_open_mpi():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    assert Seat.read(torchrun | {"MASTER_PORT": "77"}) == Seat(3, 8, 1, 2, "a", 77)
    slurm = {
        "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_STEP_ID": "0", "SLURM_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "41234",
    }  # fmt: skip
    assert Seat.read(slurm) == Seat(5, 8, 1, 4, "gpu003", 21234)
    assert Seat.read(slurm | torchrun | {"MASTER_PORT": "77"}) == Seat(3, 8, 1, 2, "a", 77)
    batch = {name: value for name, value in slurm.items() if name != "SLURM_STEP_ID"}
    assert Seat.read(batch) is None  # the script itself: what it starts with srun are the processes
    mpi = {
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }  # fmt: skip
    assert Seat.read(mpi) == Seat(1, 2, 1, 2, "127.0.0.1", 29500)
    assert Seat.read({}) is None
    with pytest.raises(HanlinError, match="process 1 of 4 on several machines: set MASTER_ADDR"):
        Seat.read(mpi | {"OMPI_COMM_WORLD_SIZE": "4"})
    with pytest.raises(HanlinError, match="process 8 of 8; expected 0 to 7"):
        Seat.read(torchrun | {"RANK": "8", "MASTER_PORT": "77"})
    with pytest.raises(HanlinError, match="are not numbers"):
        Seat.read(torchrun | {"RANK": "first", "MASTER_PORT": "77"})


@pytest.mark.parametrize(
    ("names", "first"),
    [("node7", "node7"), ("gpu[003-004,9],login", "gpu003"), ("a1,a2", "a1"), ("n[7]-ib,m", "n7-ib"), ("x[2,5]", "x2")],
)
def test_the_first_machine_of_a_slurm_list(names, first):
    assert first_host(names) == first


def test_what_cannot_be_launched_is_refused(tmp_path, monkeypatch):
    with pytest.raises(HanlinError, match="1 or more; found 0"):
        launch(["true"], 0, logs=tmp_path)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(HanlinError, match=r"one of several already \(RANK is set\)"):
        launch(["true"], 2, logs=tmp_path)


def test_who_finds_no_others_says_where_it_looked(tmp_path):
    seat = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-machine.invalid", "MASTER_PORT": str(free_port())}
    code = (
        "from datetime import timedelta\nfrom hanlin.parallel.joining import join_group\n"
        "with join_group('cpu', timeout=timedelta(seconds=2)): pass"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=os.environ | seat, capture_output=True, text=True)
    assert "HanlinError: Process 1 of 2 could not join the others at no-such-machine.invalid:" in ended.stderr


def test_cores_are_shared_out():
    assert share_of_cores(1) == len(os.sched_getaffinity(0)) and share_of_cores(10**6) == 1


# ------------------------------------------------------------------------------------------------ the command itself

STEPS, KILLS = 60, 5  # of a run; two runs
RECIPE = """
tokenizer: tokenizer
model: {kind: new, depth: 2, width: 32, heads: 2, kv_heads: 1, hidden: 64}
objective: {kind: causal_lm, seq_len: 64, shards: [{path: data}]}
parallel: {tensor: 2, shard: zero1}
train: {steps: 60, batch_size: 4, precision: fp32, device: cpu, log_every: 1, save_every: 8}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, own_words):
    """A tokenizer, shards and a recipe for four processes: two replicas of two ranks, which share AdamW's moments."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "text.txt").write_text(own_words[:100_000])
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "data.yaml").write_text("{tokenizer: tokenizer, sources: [{paths: [text.txt]}], out: data}")
    hanlin(folder, "tokenizer train text.txt --vocab-size 400 --out tokenizer")
    hanlin(folder, "data build data.yaml --quiet")
    return folder


def hanlin(folder, words):
    subprocess.run([sys.executable, "-m", "hanlin", *words.split()], cwd=folder, check=True, timeout=300)


def steps_logged(run):
    """The lines of a run by step; the last may be half written."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return {row["step"]: row for row in map(json.loads, (line for line in lines if line.endswith("\n")))}


def kill_at(run, launcher, rank, step, late, *, since):
    """SIGKILL the worker `rank`, `late` seconds after this try, which logs `since` a moment, has made the step; returns
    the step that was last logged, once all of the try are gone."""

    def reached():
        assert launcher.poll() is None
        file = run / "metrics.jsonl"
        return file.exists() and file.stat().st_mtime_ns > since and max(steps_logged(run), default=0) >= step

    until(reached, 300)
    time.sleep(late)
    workers = {int(child.environ()["RANK"]): child for child in psutil.Process(launcher.pid).children()}
    workers[rank].kill()
    until(lambda: not any(running(worker.pid) for worker in workers.values()))
    return max(steps_logged(run))


@pytest.mark.slow
def test_ten_kills_at_random_steps_leave_the_run_of_four_processes_as_it_was(workshop, capfd):
    """Loss of every step and all weights, to the last bit."""
    hanlin(workshop, "train recipe.yaml --nproc 4 --quiet --name undisturbed")
    wanted = workshop / "runs" / "undisturbed"
    draw = random.Random(0)
    for name in ("first", "second"):
        run = workshop / "runs" / name
        words = f"-m hanlin train recipe.yaml --nproc 4 --name {name} --restarts {KILLS}"
        with subprocess.Popen([sys.executable, *words.split()], cwd=workshop) as launcher:
            try:
                since, killed = 0, []
                for step in sorted(draw.sample(range(1, STEPS - 15), KILLS)):  # each try comes further than the last
                    rank = draw.randrange(4)
                    at = kill_at(run, launcher, rank, step, draw.uniform(0, 0.03), since=since)
                    since = time.time_ns()
                    killed.append((rank, at))
                assert launcher.wait(300) == 0
            finally:
                launcher.terminate()
        said = capfd.readouterr().err
        print(f"{name}: (rank, step) killed {killed}, loss {steps_logged(run)[STEPS]['loss']}")
        assert said.count("was killed by SIGKILL; all 4 processes start again") == KILLS
        for column in ("loss", "grad_norm", "tokens"):
            found, expected = ([row[column] for row in steps_logged(r).values()] for r in (run, wanted))
            assert len(found) == STEPS and found == expected
        model = "model/model.safetensors"
        assert (run / model).read_bytes() == (wanted / model).read_bytes()
