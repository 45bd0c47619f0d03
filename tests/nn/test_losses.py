"""`linear_cross_entropy` against logits and plain autograd in fp64, and token log-probabilities."""

import pytest
import torch
import torch.nn.functional as F

from hanlin.nn.losses import IGNORE, count_targets, linear_cross_entropy, token_logprobs


def plain(hidden, weight, targets):
    logits = hidden.flatten(0, -2) @ weight.T
    return F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORE)


def example(rows: int = 3, length: int = 7, width: int = 5, vocabulary: int = 11, ignored: float = 0.0):
    generator = torch.Generator().manual_seed(rows * 100 + length)
    hidden = torch.randn(rows, length, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, vocabulary, (rows, length), generator=generator)
    targets[torch.rand(rows, length, generator=generator) < ignored] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk", [1, 2, 20, 21, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_value_and_gradients_whatever_the_chunk(chunk, ignored):
    hidden, weight, targets = example(ignored=ignored)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    expected = plain(hidden, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    found = torch.autograd.grad(loss * 0.7, (hidden, weight))
    for a, b in zip(found, torch.autograd.grad(expected * 0.7, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_it_passes_gradcheck():
    hidden, weight, targets = example(2, 3, ignored=0.3)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk=2), (hidden, weight))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_nothing_costs_nothing(shape):
    hidden, weight, targets = example(*shape)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (*shape, 5) and (weight.grad == 0).all()


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = example()
    expected = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    for frozen in (0, 1):
        inputs = [hidden.detach(), weight.detach()]
        inputs[1 - frozen].requires_grad_()
        linear_cross_entropy(*inputs, targets).backward()
        assert inputs[frozen].grad is None
        torch.testing.assert_close(inputs[1 - frozen].grad, expected[1 - frozen], rtol=0, atol=1e-10)


def test_large_logits_do_not_overflow():
    hidden, weight, targets = example()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.float() * 1000, weight.float() * 10, targets)
        expected = plain(hidden * 1000, weight * 10, targets)
    assert torch.isfinite(loss) and abs(loss - expected) <= 1e-5 * expected


def test_bf16_activations_over_fp32_weights_keep_an_fp32_sum():
    hidden, weight, targets = example(8, 64, 32, 100, ignored=0.1)
    low = hidden.detach().bfloat16().requires_grad_()
    master = weight.detach().float().requires_grad_()
    loss = linear_cross_entropy(low, master, targets)
    loss.backward()
    expected = plain(low.double(), master.bfloat16().double(), targets)
    assert loss.dtype == torch.float32 and low.grad.dtype == torch.bfloat16 and master.grad.dtype == torch.float32
    assert abs(loss - expected) <= 3e-3 * expected
    exact = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    for a, b in zip((low.grad, master.grad), exact, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()


def test_a_shared_embedding_gets_both_gradients():
    torch.manual_seed(0)
    table = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.randint(0, 11, (2, 2, 6))
    found, expected = (
        torch.autograd.grad(loss(F.embedding(ids, table), table, targets), table)[0]
        for loss in (linear_cross_entropy, plain)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_targets_are_counted_without_the_ignored():
    assert count_targets(torch.tensor([[1, IGNORE, 0], [IGNORE, IGNORE, 5]])) == 3


def test_token_logprobs():
    torch.manual_seed(1)
    logits, ids = torch.randn(2, 3, 9) * 5, torch.randint(0, 9, (2, 3))
    found = token_logprobs(logits.bfloat16(), ids)
    expected = logits.bfloat16().double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
