"""Plain data parallelism over 2 and 4 processes trains as one does. fp64; `replica_checks` says what is done."""

import pytest
import torch
from tests.parallel import replica_checks as checks
from tests.parallel.replica_mutants import MUTATIONS, mutants
from tests.parallel.replicas import KINDS, in_processes
from torch import nn

from hanlin.parallel.data import BUCKET, DataParallel, make_buckets
from hanlin.parallel.flat import InOrder

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

CHECKS = {
    2: [
        checks.equals_one_process, checks.without_last, checks.unused_counts_as_zero, checks.bytes_of_a_step,
        checks.loading_reaches_the_pieces, checks.mixed_precision, checks.backward_without_weights, checks.fsdp2,
        mutants,
    ],
    4: [checks.equals_one_process, checks.experts_apart, checks.over_a_tensor_cut],
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return {n: in_processes(tmp_path_factory.mktemp(f"data-{n}"), n, runs, ("data",)) for n, runs in CHECKS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", CHECKS)
def test_six_steps_with_accumulation_give_the_weights_of_one_process(found, ranks, kind):
    """Relative L2 of every weight within 1e-10."""
    assert max(mine[f"data {kind}"] for mine in found[ranks]["equals_one_process"]) <= 1e-10


@pytest.mark.parametrize(
    ("ranks", "name"), [(2, "without_last"), (2, "fsdp2"), (2, "unused_counts_as_zero"), (4, "experts_apart")]
)
def test_so_do_other_ways_to_use_it(found, ranks, name):
    """1e-10: no `last()`; torch's fully_shard as the reference; a parameter that one rank uses; experts in a group of
    their own."""
    assert max(mine["data"] for mine in found[ranks][name]) <= 1e-10


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_it_goes_over_a_model_cut_by_tensor_parallelism(found, kind):
    """2 x 2 ranks, within 1e-10."""
    assert max(mine[f"data {kind}"] for mine in found[4]["over_a_tensor_cut"]) <= 1e-10


def test_in_bf16_the_sum_is_of_the_same_parts(found):
    """bf16 activations, fp32 gradients: within 1e-5 of the one process that does the same micro-batches."""
    assert max(mine["data"] for mine in found[2]["mixed_precision"]) <= 1e-5


@pytest.mark.parametrize("micro", (1, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_sends_the_bytes_of_the_formula(found, kind, micro):
    for mine in found[2]["bytes_of_a_step"]:
        sent, formula = mine[f"data {kind} {micro}"]
        assert sent == formula


@pytest.mark.parametrize("mutation", [name for name in MUTATIONS if name.startswith("all-reduce")])
def test_a_mutation_is_seen(found, mutation):
    assert max(mine[f"data: {mutation}"] for mine in found[2]["mutants"]) > 1e-6


def test_loaded_weights_are_used_and_closing_leaves_a_plain_model(found):
    assert found[2]["loading_reaches_the_pieces"] == [{"data": 0.0}] * 2


def parameter(numbers: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(numbers, dtype=dtype))


def test_buckets_hold_one_dtype_from_the_last_parameter_on_and_a_large_one_has_its_own():
    large = BUCKET // 4 + 1
    named = {"a": parameter(3), "b": parameter(large), "c": parameter(5, torch.float64), "d": parameter(7)}
    buckets = [[place.name for place in flat.places] for flat in make_buckets(named)]
    assert buckets == [["d"], ["b"], ["a"], ["c"]]


def test_buckets_leave_in_the_same_order_whichever_is_full_first():
    started: list[int] = []
    order = InOrder(make_buckets({str(n): parameter(BUCKET // 4) for n in range(4)}), started.append)
    for number in (2, 0, 3):
        order.arrived(number)
    assert started == [0]
    order.arrived(1)
    assert started == [0, 1, 2, 3]
    order.reset()
    order.arrived(3)
    order.flush()
    assert started == [0, 1, 2, 3] * 2


def test_one_process_keeps_its_gradients_as_they_are():
    used, unused = parameter(3), parameter(2)
    replication = DataParallel({"used": used, "unused": unused}, None)
    replication.begin()
    for _ in range(2):
        used.sum().backward()
    replication.finish()
    assert used.grad.tolist() == [2.0] * 3 and unused.grad is None
    assert replication.pieces["used"] is used and replication.ranges["used"] == (0, 3)
