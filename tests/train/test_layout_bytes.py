"""What the planner says a step sends is what the trainer's step sends: to the byte, in every layout, on every rank."""

from collections import Counter

import pytest
from tests.train.layout_cases import CASES
from tests.train.traced_steps import trace_layouts

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return trace_layouts(list(CASES), tmp_path_factory.mktemp("traced"))


@pytest.mark.parametrize("name", CASES)
def test_planned_payload_equals_traced_payload(steps, name):
    """Exactly, by collective and size of its group: {(all_reduce, 4): bytes, ...}."""
    for rank, step in enumerate(steps[name]):
        traced, planned = Counter(), Counter()
        for call in step.calls:
            traced[call.op, call.size] += call.payload
        for sent in step.planned:
            planned[sent.op, sent.ranks] += sent.payload
        assert +planned == +traced, (rank, {key: (planned[key], traced[key]) for key in planned | traced})


@pytest.mark.parametrize("name", CASES)
def test_planned_wire_equals_traced_wire(steps, name):
    """Bytes of rings, within 1e-12: the sums are floating."""
    for step in steps[name]:
        assert sum(sent.wire for sent in step.planned) == pytest.approx(sum(c.wire for c in step.calls), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_sends(steps, name):
    """The tracer saw the step: no rank is silent."""
    assert all(sum(call.payload for call in step.calls) > 0 for step in steps[name])
