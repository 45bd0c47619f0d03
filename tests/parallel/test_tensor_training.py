"""A training over ranks that share matrices, tokens or experts is the training of one process, fp64."""

import json

import pytest
from tests.parallel.training_ranks import MODELS, work
from tests.train.tiny_training import in_own_process

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

TENSOR = {f"tensor {name}": model(tensor=2) for name, model in MODELS.items()}
PAIR = {
    **TENSOR,
    **{f"sequence {name}": model(tensor=2, sequence=True) for name, model in MODELS.items()},
    **{f"expert {name}": MODELS[name](expert=2) for name in ("experts", "dressed", "latent")},
}
FOUR = {
    "sequence tied": MODELS["tied"](tensor=4, sequence=True),
    "sequence experts": MODELS["experts"](tensor=4, sequence=True, length=14),
    "sequence dressed": MODELS["dressed"](tensor=4, sequence=True),
    "expert experts": MODELS["experts"](expert=4),
    "tensor and expert": MODELS["experts"](tensor=2, expert=2),
    "sequence and expert": MODELS["experts"](tensor=2, expert=2, sequence=True),
}
WRONG = {
    "no sum into a block": "tensor tied",
    "no sum out of a block": "tensor tied",
    "no sum of a query norm's gradient": "tensor tied",
    "a loss of the own tokens": "tensor tied",
    "no sum of the head's gradient": "tensor tied",
    "no sum of a norm's gradient": "sequence experts",
    "a gathered gradient not summed": "sequence experts",
    "a router counted by every rank": "sequence experts",
    "the wrong tokens": "sequence experts",
    "the wrong experts": "expert experts",
    "rows that stay": "expert experts",
    "weights forgotten": "expert experts",
}


def run(folder, ranks: int, cases: dict, mutants: dict) -> dict:
    """{name: gaps} as the first rank told it; every rank must tell the same kind of thing."""
    processes = [in_own_process(work, rank, ranks, str(folder), cases, mutants) for rank in range(ranks)]
    for process in processes:
        process.join(600)
        if process.exitcode is None:
            process.kill()
    told = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(ranks)]
    for rank in told:
        assert "error" not in rank, rank["error"]
    return {name: {key: max(rank[name][key] for rank in told) for key in told[0][name]} for name in told[0]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two ranks told."""
    return run(tmp_path_factory.mktemp("pair"), 2, PAIR, WRONG)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What four ranks told: two ranks share a key head."""
    return run(tmp_path_factory.mktemp("four"), 4, FOUR, {})


def equals_one_process(gaps: dict) -> None:
    """Six AdamW steps with clipping and a z-loss: losses, gradient norms and weights within 1e-10; what several ranks
    hold has the same bits on each."""
    assert gaps["losses"] <= 1e-10 and gaps["norms"] <= 1e-10 and gaps["weights"] <= 1e-10, gaps
    assert gaps["apart"] == 0, gaps


@pytest.mark.parametrize("name", PAIR)
def test_two_ranks_train_what_one_does(pair, name):
    equals_one_process(pair[name])


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_train_what_one_does(four, name):
    equals_one_process(four[name])


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_shows(pair, name):
    """The same tolerances are missed by far."""
    assert max(pair[name][key] for key in ("losses", "norms", "weights")) > 1e-6, pair[name]
