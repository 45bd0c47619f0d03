"""Batch, group and instance normalisation against torch.nn's modules, which want the width in front; fp64."""

import pytest
import torch
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.nn.batch_norms import BatchNorm, GroupNorm, InstanceNorm

EXACT = {"rtol": 0, "atol": 1e-10}


def pair(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both with the same redrawn state; the names are torch's."""
    ours, theirs = ours.double(), theirs.double()
    for parameter in ours.parameters():
        parameter.data.normal_(0.5, 1.0)
    for name, buffer in ours.named_buffers():
        if name != "num_batches_tracked":
            buffer.uniform_(0.5, 2.0)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same(ours, theirs, shape=(4, 5, 6)):
    torch.manual_seed(1)
    x = (torch.randn(*shape, dtype=torch.float64) * 3 + 2).requires_grad_()
    a = ours(x)
    b = theirs(x.transpose(1, 2)).transpose(1, 2) if len(shape) == 3 else theirs(x)
    torch.testing.assert_close(a, b, **EXACT)
    direction = torch.randn_like(a)
    mine = torch.autograd.grad(a, (x, *ours.parameters()), direction)
    for one, other in zip(mine, torch.autograd.grad(b, (x, *theirs.parameters()), direction), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 2, 6), (7, 6)])
@pytest.mark.parametrize("affine", [True, False], ids=["weight and bias", "neither"])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_batch_norm_equals_torch_in_training_and_evaluation(momentum, affine, shape):
    torch.manual_seed(0)
    ours, theirs = pair(
        BatchNorm(6, 1e-3, momentum=momentum, affine=affine),
        nn.BatchNorm1d(6, 1e-3, momentum=momentum, affine=affine),
    )
    for _ in range(3):
        assert_same(ours, theirs, shape)
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, theirs.get_buffer(name), **EXACT)
    ours.eval(), theirs.eval()
    before = ours.running_mean.clone()
    assert_same(ours, theirs, shape)
    assert torch.equal(ours.running_mean, before)


def test_the_running_variance_is_unbiased_and_the_dividing_one_is_not():
    norm = BatchNorm(1, eps=0.0, momentum=1.0).double()
    x = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)  # mean 3, squares 4 + 1 + 9
    out = norm(x)
    torch.testing.assert_close(out.squeeze(), (x.squeeze() - 3) / (14 / 3) ** 0.5, **EXACT)
    assert norm.running_mean.item() == pytest.approx(3)
    assert norm.running_var.item() == pytest.approx(14 / 2)


@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 1, 6), (3, 6)])
@pytest.mark.parametrize("affine", [True, False], ids=["weight and bias", "neither"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_group_norm_equals_torch(groups, affine, shape):
    torch.manual_seed(2)
    assert_same(*pair(GroupNorm(groups, 6, 1e-3, affine=affine), nn.GroupNorm(groups, 6, 1e-3, affine=affine)), shape)


@pytest.mark.parametrize("affine", [True, False], ids=["weight and bias", "neither"])
def test_instance_norm_equals_torch(affine):
    torch.manual_seed(3)
    assert_same(*pair(InstanceNorm(6, 1e-3, affine=affine), nn.InstanceNorm1d(6, 1e-3, affine=affine)))


@pytest.mark.parametrize("norm", [BatchNorm(64), GroupNorm(4, 64), InstanceNorm(64)], ids=lambda n: type(n).__name__)
def test_statistics_are_fp32_in_bf16(norm):
    torch.manual_seed(4)
    x = (torch.randn(8, 128, 64) * 4 + 256).bfloat16()  # a sum of 1,024 such numbers is 100s off in bf16
    out = norm(x)
    expected = norm.double()(x.double())
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_what_cannot_be_normalised_is_refused():
    with pytest.raises(HanlinError, match="2 tokens"):
        BatchNorm(3)(torch.randn(1, 1, 3))
    with pytest.raises(HanlinError, match="single token"):
        InstanceNorm(3)(torch.randn(2, 1, 3))
    with pytest.raises(HanlinError, match="4 groups"):
        GroupNorm(4, 6)
    for norm in (BatchNorm(4), GroupNorm(2, 4), InstanceNorm(4)):
        with pytest.raises(HanlinError, match="width of 4"):
            norm(torch.randn(4, 4, 2))
