"""N processes equal one: four steps of the real trainer in every layout, fp64; twenty in fp32."""

import pytest
import torch
from tests.train.layout_cases import LAYOUTS, STEPS, train_case, work
from tests.train.tiny_training import in_own_process

from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run
from hanlin.train.checkpoint import open_checkpoint

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

OF_TWO = ("tp2", "cp2-ring", "ep2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function: name of a layout -> its run folder. All layouts of one number of processes are trained together."""
    root = tmp_path_factory.mktemp("layouts")

    def folder(name: str, dtype: str = "float64", steps: int = STEPS, cases=tuple(LAYOUTS)):
        world = LAYOUTS[name][0]
        place = root / f"{dtype}-{steps}"
        if not (place / f"done-{world}").exists():
            place.mkdir(exist_ok=True)
            names = [other for other in cases if LAYOUTS[other][0] == world]
            arguments = (world, str(place / f"meeting-{world}"), str(place), names, dtype, steps)
            processes = [in_own_process(work, rank, *arguments) for rank in range(world)]
            for process in processes:
                process.join(900 * max(1, steps // STEPS))
                if process.exitcode is None:
                    process.kill()
            (place / f"done-{world}").write_text(str([process.exitcode for process in processes]))
        said = [file.read_text() for file in (place / name).glob("failed-*.txt")]
        assert not said, said
        return place / name

    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function: name of a layout -> the run folder of one process that trains the same."""
    root, made = tmp_path_factory.mktemp("alone"), {}

    def folder(name: str, dtype: str = "float64", steps: int = STEPS):
        _, _, kind, rest = LAYOUTS[name]
        key = "-".join([kind, *sorted(rest), dtype, str(steps)])
        if key not in made:
            made[key] = root / key
            Run.open(made[key])
            train_case(name, made[key], getattr(torch, dtype), layout=False, steps=steps)
        return made[key]

    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_what_one_process_trains(trained, alone, name):
    """Losses and gradient norms within 1e-10, weights within 1e-9 (relative L2 of each tensor) after four steps."""
    compare(trained(name), alone(name), 1e-10, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TWO)
def test_twenty_steps_in_fp32(trained, alone, name):
    """Losses within 1e-5, weights and gradient norms within 1e-4."""
    compare(trained(name, "float32", 20, OF_TWO), alone(name, "float32", 20), 1e-5, 1e-4, norms=1e-4)


def compare(folder, reference, losses, weights, norms=None) -> None:
    found, wanted = (read_metrics(Run(path).metrics) for path in (folder, reference))
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        for key in ("loss", "grad_norm", "tokens", "lr", "router/max_violation", "eval/loss"):
            rel = norms or losses if key == "grad_norm" else losses
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=rel), (key, a["step"])
    ours, theirs = (open_checkpoint(Run(path).checkpoints()[-1][1]) for path in (folder, reference))
    for key in ("losses", "norms"):  # of every step, as the ranks judge them; a line's loss is the objective's own
        rel = norms or losses if key == "norms" else losses
        assert ours.state["spikes"][key] == pytest.approx(theirs.state["spikes"][key], rel=rel), key
    assert set(ours.names()) == set(theirs.names())
    for name in theirs.names():
        a, b = ours.whole(name), theirs.whole(name)
        if a.dtype.is_floating_point and (norms is None or name.startswith("weights/")):  # in fp32 moments drift more
            gap = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-12)
            assert gap <= weights, (name, float(gap))
