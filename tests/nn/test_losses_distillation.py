"""Divergences against torch's own distributions, their limits, and both heads in chunks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hanlin.core.errors import HanlinError
from hanlin.nn.chunked_head import Head
from hanlin.nn.distillation import forward_kl, jensen_shannon, linear_distillation, reverse_kl

ALL = [forward_kl, reverse_kl, jensen_shannon, partial(jensen_shannon, beta=0.1), partial(jensen_shannon, beta=0.9)]


def example():
    torch.manual_seed(0)
    student = (torch.randn(2, 4, 9, dtype=torch.float64) * 2).requires_grad_()
    return student, torch.randn(2, 4, 9, dtype=torch.float64) * 2, torch.rand(2, 4) < 0.7


def reference(divergence, student, teacher, temperature):
    """Of each token, by torch.distributions."""
    q, p = (Categorical(logits=x / temperature) for x in (student, teacher))
    if divergence is forward_kl:
        each = kl_divergence(p, q)
    elif divergence is reverse_kl:
        each = kl_divergence(q, p)
    else:
        beta = getattr(divergence, "keywords", {}).get("beta", 0.5)
        m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
        each = beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)
    return each * temperature**2


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_those_of_torch_distributions(divergence, temperature):
    student, teacher, keep = example()
    each = reference(divergence, student, teacher, temperature)
    found = divergence(student, teacher, temperature=temperature)
    kept = divergence(student, teacher, temperature=temperature, keep=keep)
    torch.testing.assert_close(found, each.sum(), rtol=0, atol=1e-10)
    torch.testing.assert_close(kept, each[keep].sum(), rtol=0, atol=1e-10)
    for a, b in ((found, each.sum()), (kept, each[keep].sum())):
        grads = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (a, b))
        torch.testing.assert_close(*grads, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda z: divergence(z, teacher, temperature=temperature), (student,))


def test_forward_kl_is_the_functional_one():
    student, teacher, _ = example()
    expected = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(forward_kl(student, teacher), expected, rtol=0, atol=1e-10)


def test_temperature_keeps_the_size_of_gradients():
    """For T far above the logits the slope tends to (z_student - z_teacher) / V, both centred (arXiv:1503.02531)."""
    student, teacher, _ = example()
    forward_kl(student, teacher, temperature=1e4).backward()
    centred = [x.detach() - x.detach().mean(-1, keepdim=True) for x in (student, teacher)]
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / 9, rtol=0, atol=1e-3)


def test_jensen_shannon_tends_to_both_kullback_leiblers_and_is_bounded():
    student, teacher, _ = example()
    small = 1e-7
    forward = jensen_shannon(student, teacher, beta=small) / small
    reverse = jensen_shannon(student, teacher, beta=1 - small) / small
    torch.testing.assert_close(forward, forward_kl(student, teacher), rtol=1e-5, atol=0)
    torch.testing.assert_close(reverse, reverse_kl(student, teacher), rtol=1e-5, atol=0)
    torch.testing.assert_close(jensen_shannon(student, teacher), jensen_shannon(teacher, student), rtol=0, atol=1e-12)
    apart = jensen_shannon(torch.tensor([[1e3, 0.0]]), torch.tensor([[0.0, 1e3]]))
    torch.testing.assert_close(apart, torch.tensor(2.0).log(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("divergence", ALL)
def test_no_distance_from_itself_and_no_gradient(divergence):
    student, _, _ = example()
    loss = divergence(student, student)
    loss.backward()
    assert abs(loss) <= 1e-12 and student.grad.abs().max() <= 1e-12


@pytest.mark.parametrize("divergence", ALL)
def test_a_forbidden_token_adds_nothing(divergence):
    student, teacher, _ = example()
    expected = divergence(student, teacher)
    wall = torch.full((2, 4, 1), float("-inf"), dtype=torch.float64)
    padded = torch.cat([student, wall], -1).detach().requires_grad_()
    found = divergence(padded, torch.cat([teacher, wall], -1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(found, padded)
    torch.testing.assert_close(grad[..., :-1], torch.autograd.grad(expected, student)[0], rtol=0, atol=1e-12)
    assert (grad[..., -1] == 0).all()


class Sizes(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("divergence", [partial(d, temperature=1.5) for d in ALL])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_through_both_heads_it_is_the_same(divergence, chunk):
    _, _, keep = example()
    hidden = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    told = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    head = Head(
        torch.randn(9, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(9, dtype=torch.float64, requires_grad=True), scale=0.6,
    )  # fmt: skip
    teacher = Head(torch.randn(9, 6, dtype=torch.float64, requires_grad=True), softcap=2.0)
    found = linear_distillation(hidden, head, told, teacher, divergence=divergence, keep=keep, chunk=chunk)
    logits = (hidden @ head.weight.T + head.bias) * 0.6
    expected = divergence(logits, 2 * torch.tanh(told @ teacher.weight.T / 2), keep=keep)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    inputs = (hidden, head.weight, head.bias)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    with pytest.raises(RuntimeError, match="not have been used"):
        again = linear_distillation(hidden, head, told, teacher, divergence=divergence)
        torch.autograd.grad(again, (told, teacher.weight))


def test_neither_matrix_of_logits_is_ever_whole():
    hidden, told = torch.randn(100, 4, requires_grad=True), torch.randn(100, 6)
    head, teacher = Head(torch.randn(300, 4, requires_grad=True)), Head(torch.randn(300, 6))
    with Sizes() as sizes:
        linear_distillation(hidden, head, told, teacher, divergence=jensen_shannon, chunk=10).backward()
    assert sizes.largest == 10 * 300


def test_what_does_not_fit_is_refused():
    student, teacher, _ = example()
    with pytest.raises(HanlinError, match="`temperature` is 0"):
        forward_kl(student, teacher, temperature=0)
    with pytest.raises(HanlinError, match="`beta` is 1"):
        jensen_shannon(student, teacher, beta=1)
    with pytest.raises(HanlinError, match="must be alike"):
        reverse_kl(student, teacher[..., :-1])
    with pytest.raises(HanlinError, match="student knows 5 tokens and the teacher 6"):
        linear_distillation(torch.zeros(1, 2), Head(torch.zeros(5, 2)), torch.zeros(1, 2), Head(torch.zeros(6, 2)))
