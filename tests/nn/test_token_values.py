"""Numbers of each token through the output head, a chunk at a time: what autograd over all logits gives."""

import pytest
import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.chunked_head import Head
from hanlin.nn.token_values import token_logprobs_and_entropy, values_through_head


def inputs(dtype=torch.float64, *, n=23, width=8, vocabulary=37, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(n, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    shift = torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, shift, torch.randint(vocabulary, (n,))


def plain(hidden, weight, bias, ids, *, softcap, scale, temperature):
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = scale * z
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = (z / temperature).log_softmax(-1)
    return log_p.gather(-1, ids[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize(("softcap", "scale", "temperature"), [(None, 1.0, 1.0), (3.0, 0.5, 0.7)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_those_of_all_logits(softcap, scale, temperature, bias):
    hidden, weight, shift, ids = inputs(bias=bias)
    leaves = [x for x in (hidden, weight, shift) if x is not None]
    up = torch.randn(2, len(ids), dtype=torch.float64)
    expected = plain(hidden, weight, shift, ids, softcap=softcap, scale=scale, temperature=temperature)
    slopes = torch.autograd.grad((expected[0] * up[0] + expected[1] * up[1]).sum(), leaves)
    found = token_logprobs_and_entropy(
        hidden, Head(weight, shift, softcap, scale), ids, temperature=temperature, entropy=True
    )
    assert found[1] is not None
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad((found[0] * up[0] + found[1] * up[1]).sum(), leaves), slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_without_entropy_the_log_probabilities_are_the_same():
    hidden, weight, shift, ids = inputs()
    with_it, _ = token_logprobs_and_entropy(hidden, Head(weight, shift), ids, entropy=True)
    alone, none = token_logprobs_and_entropy(hidden, Head(weight, shift), ids)
    assert none is None
    torch.testing.assert_close(alone, with_it, rtol=0, atol=1e-14)
    slope = torch.autograd.grad(alone.sum(), weight)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(with_it.sum(), weight)[0], rtol=0, atol=1e-12)


def test_any_function_of_the_logits_goes_through():
    """The divergence from another distribution, its slope by autograd, in chunks of five tokens."""
    hidden, weight, shift, _ = inputs()
    other = torch.randn(len(hidden), len(weight), dtype=torch.float64).log_softmax(-1)

    def divergence(z: Tensor, told: Tensor) -> Tensor:
        return (told.exp() * (told - z.log_softmax(-1))).sum(-1, keepdim=True)

    found = values_through_head(hidden, Head(weight, shift), divergence, other, chunk=5)
    expected = divergence(hidden @ weight.T + shift, other)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for leaf in (hidden, weight, shift):
        a, b = (torch.autograd.grad(x.square().sum(), leaf, retain_graph=True)[0] for x in (found, expected))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_half_precision_stays_near():
    hidden, weight, shift, ids = inputs(torch.float32)
    expected = plain(hidden, weight, shift, ids, softcap=None, scale=1.0, temperature=1.0)[0]
    found, _ = token_logprobs_and_entropy(hidden.bfloat16(), Head(weight, shift), ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15)


def test_no_token_is_no_number():
    hidden, weight, shift, ids = inputs()
    found, _ = token_logprobs_and_entropy(hidden[:0], Head(weight, shift), ids[:0])
    assert found.shape == (0,)
    found.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_what_does_not_fit_is_refused():
    hidden, weight, _, ids = inputs()
    with pytest.raises(HanlinError, match="do not fit a head"):
        token_logprobs_and_entropy(hidden[:, :3], Head(weight), ids)
    with pytest.raises(HanlinError, match="temperature"):
        token_logprobs_and_entropy(hidden, Head(weight), ids, temperature=0.0)
