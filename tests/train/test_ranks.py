"""Two processes over gloo equal one process with the whole batch."""

import pytest
from tiny_training import as_one_of, in_own_process, tiny_model, train, weights

from hanlin.core.metrics import read_metrics

SETTINGS = {"steps": 5, "micro_batch_size": 2, "log_every": 2, "schedule": {"kind": "constant"}, "clip": 0.5}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_equal_one_and_one_goes_on_from_two(tmp_path, optimizer):
    """fp64; rows with unequal numbers of targets on the ranks: relative L2 of every weight <= 1e-11 after 5 steps, and
    after 4 more in one process from the checkpoint that two wrote."""
    settings = SETTINGS | {"optimizer": {"kind": optimizer}}
    arguments = (2, str(tmp_path / "meeting"), str(tmp_path / "two"), settings)
    processes = [in_own_process(as_one_of, rank, *arguments) for rank in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    train(tmp_path / "one", settings, model=tiny_model().double())
    compare(tmp_path, (1, 2, 4, 5))
    for name in ("one", "two"):
        train(tmp_path / name, settings | {"steps": 9}, model=tiny_model().double())
    compare(tmp_path, (1, 2, 4, 5, 6, 8, 9))


def compare(folder, steps) -> None:
    one, two = weights(folder / "one"), weights(folder / "two")
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-11 * one[name].norm(), name
    rows = [read_metrics(folder / name / "metrics.jsonl") for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        for key in ("step", "tokens", "loss", "grad_norm", "lr"):
            assert a[key] == pytest.approx(b[key], rel=1e-9)
