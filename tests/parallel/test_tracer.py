"""The tracer sees every call of a process: plain, asynchronous, of backward, of DTensor, messages; with exact bytes."""

import pytest
from tests.parallel.replicas import in_processes
from tests.parallel.traced import every_call

from hanlin.parallel.tracer import Call

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_processes(tmp_path_factory.mktemp("tracer"), 4, [every_call], ())["every_call"]


def test_every_call_is_written_down_in_order_with_its_payload(found):
    """x: 6 fp32 numbers; whole: 6 of each of 4 ranks, fp64."""
    x, whole = 6 * 4, 6 * 4 * 8
    expected = [
        ["all_reduce", x, 4], ["all_reduce", x, 4], ["all_gather", whole, 4], ["all_gather", 4 * x, 4],
        ["reduce_scatter", whole, 4], ["all_to_all", whole, 4], ["all_to_all", 4 * x, 4], ["broadcast", x, 4],
        ["reduce", x, 4], ["send", x, 4], ["barrier", 0, 4],
    ]  # fmt: skip
    for rank, mine in enumerate(found):
        assert mine["calls"] == expected + ([["all_reduce", 12, 2]] if rank < 2 else [])
        assert mine["pair"] == ({"all_reduce": 12} if rank < 2 else {})


def test_bytes_add_up_by_operation(found):
    for mine in found:
        assert mine["bytes"] == {op: sum(c[1] for c in mine["calls"] if c[0] == op) for op in mine["bytes"]}
        assert set(mine["bytes"]) == {call[0] for call in mine["calls"]}


def test_the_calls_of_a_backward_are_seen(found):
    assert all(mine["backward"] == [["all_reduce", 20]] for mine in found)


def test_the_calls_of_dtensor_are_seen(found):
    """4 x 4 fp32 numbers joined, one number summed."""
    assert all(mine["dtensor"] == [["all_gather", 64, 4], ["all_reduce", 4, 4]] for mine in found)


def test_wire_bytes_are_those_of_a_ring():
    """Each rank of n sends n - 1 of n parts, once or twice."""
    ranks = (0, 1, 2, 3)
    assert Call("all_reduce", 800, ranks).wire == 2 * 3 * 200
    assert Call("all_gather", 800, ranks).wire == Call("reduce_scatter", 800, ranks).wire == 3 * 200
    assert Call("send", 800, ranks).wire == Call("broadcast", 800, ranks).wire == 800
