"""The lessons do what torch's collectives do, and send as many bytes as they say; threads train as one model does."""

import copy
import json

import pytest
import torch
import torch.multiprocessing as multiprocessing
from tests.parallel.lesson_ranks import compare
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.parallel.lessons.data_parallel import ThreadedDataParallel, replicate
from hanlin.parallel.lessons.eight import cost

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

EIGHT = {
    "broadcast", "reduce", "scatter", "gather", "all_gather", "reduce_scatter", "all_reduce", "all_to_all",
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_messages_alone_do_what_the_collectives_do(tmp_path, n):
    """Random fp64 within 1e-12 (sums: another order), int64 exactly; bytes as the tracer counts them; from every root,
    and within a smaller group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tests.parallel.lesson_ranks"])
    arguments = (n, str(tmp_path / "meeting"), str(tmp_path))
    processes = [context.Process(target=compare, args=(rank, *arguments)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(n)]
    for rank, mine in enumerate(told):
        assert mine.keys() >= EIGHT | {"ring"}
        for name in EIGHT | {"ring"}:
            gap, traced, expected = mine[name]
            assert gap <= 1e-12 and traced == expected, (rank, name, mine[name])
        assert mine["wire"][0] == mine["wire"][1] == 12 * 8 * 2 * (n - 1) / n  # n divides 12: the tracer's ring
        assert mine.get("within a group", [0.0])[0] <= 1e-12
        assert {k: v for k, v in mine.items() if k[:4] == "bits"} == {
            k: v for k, v in told[0].items() if k[:4] == "bits"
        }  # every rank ends with the same bits


def test_the_table_of_costs_is_what_the_functions_cost():
    """The busiest rank's bytes and the steps, for S = 840 bytes and 2 to 8 ranks, as the module's docstring says."""
    size = 840
    for n in range(2, 9):
        depth, part = (n - 1).bit_length(), size // n * (n - 1)
        said = {
            "broadcast": (size * depth, depth), "reduce": (size, depth), "scatter": (part, n - 1),
            "gather": (size // n, n - 1), "all_gather": (part, n - 1), "reduce_scatter": (part, n - 1),
            "all_reduce": (size * depth, 2 * depth), "all_to_all": (part, n - 1),
        }  # fmt: skip
        for name, (sent, steps) in said.items():
            costs = [cost(name, size, n, rank) for rank in range(n)]
            assert (max(c.sent for c in costs), costs[0].steps) == (sent, steps), (name, n)


class Sample(nn.Module):
    """Tied weights, a buffer, a module used twice, an argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.mix = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6))
        self.head = nn.Linear(6, 11)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))

    def forward(self, ids: torch.Tensor, *, weights: torch.Tensor, times: int = 1) -> torch.Tensor:
        x = self.table(ids)
        for _ in range(times):
            x = x + self.mix(x) * self.scale * weights[:, None, None]
        return self.head(x)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("devices", [1, 3])
def test_threads_train_as_one_model_does(rows, devices):
    """fp64: outputs and gradients within 1e-12, also where rows do not divide among the devices."""
    torch.manual_seed(0)
    plain = Sample().double()
    threaded = ThreadedDataParallel(copy.deepcopy(plain), ["cpu"] * devices)
    ids, weights = torch.randint(0, 11, (rows, 4)), torch.rand(rows, dtype=torch.float64)
    wanted, found = (model(ids, weights=weights, times=2) for model in (plain, threaded))
    assert (found - wanted).abs().max() <= 1e-12
    for output in (wanted, found):
        output.square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), threaded.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-12, name
    with torch.no_grad():
        assert not threaded(ids, weights=weights).requires_grad


def test_a_copy_has_weights_of_its_own_and_keeps_what_is_shared():
    """Written over in a copy, a weight changes under its other name too, and not in the model."""
    model = Sample()
    first, second = replicate(model, [torch.device("cpu")] * 2)
    with torch.no_grad():
        second.table.weight.zero_()
    assert second.head.weight.detach().abs().max() == 0
    assert min(m.table.weight.detach().abs().max() for m in (model, first)) > 0
    assert first.scale is model.scale and second.scale is not model.scale


def test_an_error_in_a_thread_is_raised_and_different_rows_are_refused():
    threaded = ThreadedDataParallel(Sample(), ["cpu", "cpu"])
    with pytest.raises(IndexError):
        threaded(torch.full((4, 2), 99), weights=torch.ones(4))
    with pytest.raises(HanlinError, match="same number of rows"):
        threaded(torch.ones(4, 2, dtype=torch.long), weights=torch.ones(3))
