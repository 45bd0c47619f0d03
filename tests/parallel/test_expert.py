"""Experts over ranks, tokens over ranks, a vocabulary over ranks: each against the same in one process, beside the
trainings of `test_tensor_training`."""

import pytest
import torch
import torch.nn.functional as F
from tests.parallel.crossing_ranks import CHECKS, check
from tests.parallel.training_ranks import MODELS
from tests.train.tiny_training import in_own_process

from hanlin.core.errors import HanlinError
from hanlin.nn.chunked_head import Head
from hanlin.nn.losses import IGNORE
from hanlin.parallel import split_experts
from hanlin.parallel.vocabulary import token_sums

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Folder of what two ranks found."""
    folder = tmp_path_factory.mktemp("checks")
    processes = [in_own_process(check, rank, 2, str(folder)) for rank in range(2)]
    for process in processes:
        process.join(600)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_find_it_so(told, name):
    errors = [(told / f"{name}-{rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert errors == ["", ""], errors[0] or errors[1]


@pytest.mark.parametrize("trained", [0.7, 0.0])
def test_token_sums_of_a_whole_head_are_those_of_all_logits(trained):
    """fp64, 5 tokens at a time: sums within 1e-12, gradients of both in any proportion within 1e-11."""
    torch.manual_seed(2)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 9, 16), (31, 16), (31,))
    )
    targets = torch.randint(0, 31, (2, 9)).masked_fill(torch.rand(2, 9) >= trained, IGNORE)
    z = 3 * torch.tanh(1.3 * F.linear(hidden, weight, bias) / 3)
    wanted = (
        F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum"),
        z.logsumexp(-1).square()[targets != IGNORE].sum(),
    )
    found = token_sums(hidden, Head(weight, bias, 3.0, 1.3), targets, chunk=5)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs() <= 1e-12 * b.abs() + 1e-12
    for proportion in ((1.0, 0.0), (0.3, 2.0), (0.0, 1.0)):
        slopes = [
            torch.autograd.grad(sum(c * s for c, s in zip(proportion, sums, strict=True)), (hidden, weight, bias),
                                retain_graph=True)
            for sums in (found, wanted)
        ]  # fmt: skip
        for a, b in zip(*slopes, strict=True):
            assert (a - b).abs().max() <= 1e-11


def test_without_a_process_group_experts_are_not_split():
    with pytest.raises(HanlinError, match="process group"):
        split_experts(MODELS["experts"]().model())
