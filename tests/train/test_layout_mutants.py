"""A proof must be able to fail: each plausible mistake in training over processes breaks the equality with one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.train.layout_cases import CASES, train_case
from tests.train.mutants_ranks import MUTANTS
from tests.train.test_layouts import compare
from tests.train.tiny_training import in_own_process

from hanlin.core.runs import Run

pytestmark = pytest.mark.slow  # a minute: every mistake is a training of its own
STEPS = 3
SOUND = sorted({layout for layout, _ in MUTANTS.values()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder with a run for every mistake, and one without any for every layout."""
    root = tmp_path_factory.mktemp("mutants")
    processes = [in_own_process(train_mutants, rank, str(root)) for rank in range(2)]
    for process in processes:
        process.join(500)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0], list(root.glob("failed-*"))
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function: name of a layout -> the run folder of one process that trains the same."""
    root, made = tmp_path_factory.mktemp("alone"), {}

    def folder(layout: str):
        _, _, kind, rest = CASES[layout]
        key = kind + "".join(sorted(rest))
        if key not in made:
            made[key] = root / key
            Run.open(made[key])
            train_case(layout, made[key], layout=False, steps=STEPS)
        return made[key]

    return folder


@pytest.mark.parametrize("layout", SOUND)
def test_without_a_mistake_the_comparison_holds(trained, alone, layout):
    compare(trained / layout, alone(layout), 1e-10, 1e-10)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_fails_for(trained, alone, mutant):
    """With the tolerance of single precision, which is looser than the one that layouts are held to."""
    layout, _ = MUTANTS[mutant]
    with pytest.raises(AssertionError):
        compare(trained / mutant.replace(" ", "-"), alone(layout), 1e-6, 1e-6)


def train_mutants(rank: int, root: str) -> None:
    """One of two processes: every layout as it is, then every mistake."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)
    cases = [(layout, layout, None) for layout in SOUND]
    cases += [(name.replace(" ", "-"), *what) for name, what in MUTANTS.items()]
    for name, layout, mutate in cases:
        folder = Path(root) / name
        if rank == 0:
            Run.open(folder)
        dist.barrier()
        with pytest.MonkeyPatch.context() as patch:
            if mutate is not None:
                mutate(patch)
            try:
                train_case(layout, folder, steps=STEPS)
            except Exception as error:
                (Path(root) / f"failed-{name}-{rank}").write_text(f"{type(error).__name__}: {error}")
                raise
    dist.destroy_process_group()
