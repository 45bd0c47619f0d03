"""The bytes that the planner says are the bytes that a process-group tracer sees, exactly, for every layout."""

import json
import multiprocessing

import pytest
from tests.plan.traffic_ranks import LENGTH, config_of, one_step

from hanlin.parallel.settings import Layout
from hanlin.plan.communication import StepShape, by_axis, by_op, step_traffic

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

TWO, ONE, AGAIN = {"micro": 2}, {"micro": 1}, {"recompute": True}
CASES = {
    2: [
        ("plain", {}, {}),
        ("plain", {"shard": "zero2"}, TWO),
        ("plain", {"tensor": 2}, TWO),
        ("tied", {"tensor": 2}, {}),
        ("norms", {"tensor": 2}, TWO),
        ("experts", {"tensor": 2}, {}),
        ("latent", {"tensor": 2}, {}),
        ("norms", {"tensor": 2, "sequence": True}, TWO),
        ("experts", {"tensor": 2, "sequence": True}, {}),
        ("latent", {"tensor": 2, "sequence": True}, {}),
        ("plain", {"tensor": 2}, AGAIN),
        ("plain", {"tensor": 2, "sequence": True}, AGAIN),
        ("plain", {"context": 2}, {}),
        ("latent", {"context": 2}, TWO),
        ("plain", {"context": 2, "context_kind": "ulysses"}, {}),
        ("latent", {"context": 2, "context_kind": "ulysses"}, {}),
        ("plain", {"context": 2}, AGAIN),
        ("experts", {"expert": 2}, {}),
        ("experts", {"expert": 2}, {"micro": 2, "recompute": True}),
        ("plain", {"pipeline": 2, "schedule": "zero_bubble"}, ONE),
        ("tied", {"pipeline": 2, "schedule": "interleaved"}, ONE),
    ],
    4: [
        ("plain", {"shard": "zero1"}, {}),
        ("experts", {"shard": "zero2"}, ONE),
        ("plain", {"shard": "zero3"}, ONE),
        ("plain", {"shard": "zero3"}, AGAIN),
        ("tied", {"tensor": 4, "sequence": True}, {}),
        ("plain", {"pipeline": 4, "schedule": "naive"}, ONE),
        ("plain", {"pipeline": 4, "schedule": "gpipe"}, ONE),
        ("tied", {"pipeline": 4, "schedule": "1f1b"}, ONE),
        ("plain", {"context": 4}, {}),
        ("plain", {"context": 4, "context_kind": "ulysses"}, TWO),
        ("plain", {"tensor": 2, "context": 2}, {}),
        ("norms", {"tensor": 2, "pipeline": 2, "schedule": "1f1b"}, TWO),
        ("plain", {"tensor": 2, "shard": "zero1"}, {}),
        ("experts", {"expert": 2, "shard": "zero2"}, TWO),
        ("experts", {"expert": 2, "tensor": 2}, {}),
    ],
    8: [
        ("plain", {"data": 2, "tensor": 2, "pipeline": 2, "sequence": True, "shard": "zero1"}, ONE),
    ],
}


@pytest.fixture(scope="module", params=sorted(CASES))
def seen(request, tmp_path_factory):
    """(ranks, what every rank sent in each case)."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"ranks-{world}")
    cases = [
        {"model": model, "layout": layout, "micro": None, "recompute": False, **how}
        for model, layout, how in CASES[world]
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tests.plan.traffic_ranks"])
    processes = [context.Process(target=one_step, args=(rank, world, str(folder), cases)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    return world, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def test_planned_bytes_equal_traced_bytes(seen):
    """Op by op and rank by rank; how many rows come to a rank's experts is the routers' choice, so those bytes are
    added up over all ranks."""
    world, ranks = seen
    wrong = []
    for number, (model, fields, how) in enumerate(CASES[world]):
        layout = Layout.model_validate(fields).fitted(world)
        chosen = [0, 0]
        for rank, found in enumerate(cases[number] for cases in ranks):
            shape = StepShape(
                found["rows"], LENGTH, found["micro_batches"], recompute="recompute" in how,
                trained=found["trained"],
            )  # fmt: skip
            planned = step_traffic(config_of(model), shape, layout, pipeline=found["pipeline"], tensor=found["tensor"])
            traced, told = found["bytes"], by_op(planned)
            if "expert" in fields:
                chosen[0] += traced.pop("all_to_all")
                chosen[1] += told.pop("all_to_all")
            if told != traced:
                wrong.append(f"{model} {fields} {how} rank {rank}: planned {told}, {traced}")
        if chosen[0] != chosen[1]:
            wrong.append(f"{model} {fields} {how}: exchanges of experts, planned {chosen[1]}, {chosen[0]}")
    assert not wrong, "\n".join(wrong)


def test_wire_bytes_are_those_of_rings():
    """An all-reduce of n ranks sends 2 (n - 1) / n of its payload, a gather (n - 1) / n, a message all of it."""
    traffic = step_traffic(config_of("plain"), StepShape(2, LENGTH), Layout(shard="zero1").fitted(4))
    axes = by_axis([sent for sent in traffic if sent.axis == "replicas"])
    assert axes["replicas"]["wire"] == pytest.approx(axes["replicas"]["payload"] * 3 / 4)
    numbers = config_of("plain").parameters().total
    assert axes["replicas"]["payload"] >= 2 * 4 * numbers  # ZeRO-1: gradients out, weights in
