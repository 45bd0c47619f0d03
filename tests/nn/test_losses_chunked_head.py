"""Any loss through the output head equals the same loss over whole logits, in value and gradients."""

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.nn.chunked_head import Head, through_head
from hanlin.nn.losses import IGNORE, linear_cross_entropy


def example(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 5, dtype=dtype, requires_grad=True)
    bias = torch.randn(11, dtype=dtype, requires_grad=True)
    return hidden, Head(weight, bias, softcap=2.5, scale=0.8)


def whole(hidden, head):
    return torch.tanh((hidden @ head.weight.T + head.bias) * head.scale / head.softcap) * head.softcap


def odd_loss(logits, prices, shift):
    """Nothing that any other file knows: a smooth maximum of priced logits."""
    return ((logits * prices).logsumexp(-1) * shift).sum()


@pytest.mark.parametrize("chunk", [1, 4, 21, None])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
def test_a_loss_through_the_head_is_the_loss_of_all_logits(chunk, kept):
    hidden, head = example()
    prices, shift = torch.rand(3, 7, 11, dtype=torch.float64), torch.rand(3, 7, dtype=torch.float64)
    keep = torch.rand(3, 7) < kept
    found = through_head(hidden, head, odd_loss, prices, shift, keep=keep, chunk=chunk)
    expected = odd_loss(whole(hidden, head)[keep], prices[keep], shift[keep])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    inputs = (hidden, head.weight, head.bias)
    for a, b in zip(torch.autograd.grad(found * 3, inputs), torch.autograd.grad(expected * 3, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_it_passes_gradcheck():
    hidden, head = example()
    hidden = hidden[0, :3].detach().requires_grad_()

    def loss(h, w, b):
        return through_head(h, Head(w, b, 2.5, 0.8), lambda z: z.square().logsumexp(-1).sum(), chunk=2)

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_cross_entropy_with_its_own_slope_equals_the_one_that_autograd_makes():
    hidden, head = example()
    targets = torch.randint(0, 11, (3, 7))
    targets[1, 2:5] = IGNORE

    def loss(logits, target):
        return torch.nn.functional.cross_entropy(logits, target, reduction="sum")

    general = through_head(hidden, head, loss, targets, keep=targets != IGNORE, chunk=4)
    own = linear_cross_entropy(
        hidden, head.weight, targets, bias=head.bias, softcap=head.softcap, scale=head.scale, chunk=5
    )
    inputs = (hidden, head.weight, head.bias)
    torch.testing.assert_close(general, own, rtol=0, atol=1e-10)
    for a, b in zip(torch.autograd.grad(general, inputs), torch.autograd.grad(own, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_without_gradients_only_the_value_is_made():
    hidden, head = example()
    with torch.no_grad():
        found = through_head(hidden, head, lambda z: z.sum())
    assert not found.requires_grad
    torch.testing.assert_close(found, whole(hidden, head).sum(), rtol=0, atol=1e-10)
    frozen = Head(head.weight.detach(), head.bias.detach())
    assert not through_head(hidden.detach(), frozen, lambda z: z.sum()).requires_grad


def test_logits_of_a_head_are_the_equation():
    hidden, head = example()
    torch.testing.assert_close(head.logits(hidden), whole(hidden, head).detach(), rtol=0, atol=1e-12)
    plain = Head(head.weight, scale=0.5)
    torch.testing.assert_close(plain.logits(hidden), 0.5 * (hidden @ head.weight.T).detach(), rtol=0, atol=1e-12)


def test_bf16_hidden_states_over_an_fp32_head():
    hidden, head = example()
    low = hidden.detach().bfloat16().requires_grad_()
    master = Head(head.weight.detach().float().requires_grad_(), head.bias.detach().float().requires_grad_(), 2.5, 0.8)
    loss = through_head(low, master, lambda z: z.logsumexp(-1).sum(), chunk=4)
    loss.backward()
    exact = whole(hidden, head).logsumexp(-1).sum()
    exact.backward()
    assert loss.dtype == torch.float32 and abs(loss - exact) <= 5e-3 * exact
    for found, expected in ((low, hidden), (master.weight, head.weight), (master.bias, head.bias)):
        assert found.grad.dtype == found.dtype
        assert (found.grad - expected.grad).norm() <= 0.02 * expected.grad.norm()


def test_what_would_be_ignored_is_refused():
    hidden, head = example()
    with pytest.raises(HanlinError, match="detach the others"):
        through_head(hidden, head, odd_loss, torch.rand(3, 7, 11, requires_grad=True), torch.rand(3, 7))
    with pytest.raises(HanlinError, match="not of the same tokens"):
        through_head(hidden, head, lambda z: z.sum(), keep=torch.ones(7, 3, dtype=torch.bool))
    with pytest.raises(HanlinError, match=r"\(vocabulary, width\)"):
        Head(torch.zeros(3))
