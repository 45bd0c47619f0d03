"""`linear_cross_entropy` against logits and plain autograd in fp64, token log-probabilities, binary cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_pt_utils import LabelSmoother

from hanlin.core.errors import HanlinError
from hanlin.nn.chunked_head import rows_per_chunk
from hanlin.nn.losses import IGNORE, binary_cross_entropy, count_targets, linear_cross_entropy, token_logprobs


def plain(hidden, weight, targets, *, bias=None, scale=1.0, softcap=None, label_smoothing=0.0, z_loss=0.0):
    logits = F.linear(hidden.flatten(0, -2), weight, bias) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    targets = targets.flatten()
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE, label_smoothing=label_smoothing)
    return total + z_loss * torch.logsumexp(logits, -1)[targets != IGNORE].square().sum()


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


def test_it_passes_gradcheck_with_everything_on():
    hidden, weight, targets = example(2, 3, ignored=0.3)
    bias = torch.randn(len(weight), dtype=torch.float64, requires_grad=True)

    def loss(h, w, b):
        return linear_cross_entropy(
            h, w, targets, chunk=2, bias=b, softcap=2.0, scale=0.7, label_smoothing=0.1, z_loss=0.3
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 6),
    chunk=st.integers(1, 30),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    with_bias=st.booleans(),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    scale=st.sampled_from([1.0, 0.125, -3.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    z_loss=st.sampled_from([0.0, 1e-4, 2.0]),
)
def test_every_option_with_every_other(
    rows, length, chunk, ignored, with_bias, softcap, scale, label_smoothing, z_loss
):
    hidden, weight, targets = example(rows, length, ignored=ignored)
    bias = torch.linspace(-2, 3, len(weight), dtype=torch.float64, requires_grad=True) if with_bias else None
    options = {
        "bias": bias, "softcap": softcap, "scale": scale, "label_smoothing": label_smoothing, "z_loss": z_loss
    }  # fmt: skip
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk, **options)
    expected = plain(hidden, weight, targets, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-10)
    found = torch.autograd.grad(loss * -1.3, inputs)
    for a, b in zip(found, torch.autograd.grad(expected * -1.3, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10)


def test_label_smoothing_is_that_of_transformers():
    hidden, weight, targets = example(ignored=0.3)
    logits = hidden @ weight.T
    smoother = LabelSmoother(epsilon=0.15, ignore_index=IGNORE)
    expected = smoother({"logits": logits}, targets)
    found = linear_cross_entropy(hidden, weight, targets, label_smoothing=0.15) / count_targets(targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # theirs sums the uniform part in fp32


def test_a_second_backward_gives_the_same_again():
    """What the forward pass made is scaled in place only if nobody may ask again."""
    hidden, weight, targets = example()
    loss = linear_cross_entropy(hidden, weight, targets) * 0.25
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [grad.clone() for grad in first]
    loss.backward()
    for a, b, parameter in zip(first, kept, (hidden, weight), strict=True):
        assert torch.equal(a, b) and torch.equal(parameter.grad, b)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Sizes(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.1}])
def test_no_tensor_is_larger_than_a_chunk_of_logits(options):
    hidden = torch.randn(200, 4, requires_grad=True)
    weight = torch.randn(300, 4, requires_grad=True)
    with Sizes() as sizes:
        linear_cross_entropy(hidden, weight, torch.arange(200), chunk=20, **options).backward()
    assert sizes.largest == 20 * 300


def test_forward_and_backward_are_three_products():
    hidden = torch.randn(20, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, torch.arange(20), chunk=7).backward()
    assert counter.get_total_flops() == 3 * 2 * 20 * 50 * 8


@pytest.mark.parametrize(("vocabulary", "rows"), [(100, 512), (65_536, 512), (151_936, 416), (10**9, 32)])
def test_chunks_are_short_where_the_vocabulary_is_large(vocabulary, rows):
    assert rows_per_chunk(vocabulary) == rows


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chunk": 0}, "`chunk` is 0"),
        ({"label_smoothing": 1.0}, "`label_smoothing` is 1.0"),
        ({"z_loss": -0.1}, "`z_loss` is -0.1"),
        ({"softcap": 0.0}, "`softcap` is 0.0"),
        ({"bias": torch.zeros(4)}, r"over 11 tokens is \(11,\); this one is \[4\]"),
        ({"weight": torch.zeros(11, 6)}, r"\[3, 7, 5\] do not fit a head \[11, 6\]"),
        ({"targets": torch.zeros(3, 6, dtype=torch.int64)}, r"Targets \[3, 6\] do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    hidden, weight, targets = example()
    with pytest.raises(HanlinError, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "targets": targets} | wrong)


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


def test_binary_cross_entropy_is_that_of_torch():
    torch.manual_seed(2)
    logits = (torch.randn(4, 6, dtype=torch.float64) * 3).requires_grad_()
    targets, weight = torch.rand(4, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) * 5
    keep = torch.rand(4, 6) < 0.7
    found = binary_cross_entropy(logits, targets, positive_weight=weight, keep=keep)
    each = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    torch.testing.assert_close(found, each[keep].sum(), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        binary_cross_entropy(logits, targets),
        F.binary_cross_entropy_with_logits(logits, targets, reduction="sum"), rtol=0, atol=1e-10,
    )  # fmt: skip
    assert torch.autograd.gradcheck(lambda x: binary_cross_entropy(x, targets, positive_weight=weight), (logits,))


def test_binary_cross_entropy_is_finite_for_a_sure_mistake():
    loss = binary_cross_entropy(torch.tensor([1e4, -1e4]).half(), torch.tensor([0.0, 1.0]))
    assert loss.dtype == torch.float32 and abs(loss - 2e4) <= 2e4 * 1e-3
    with pytest.raises(HanlinError, match="do not fit logits"):
        binary_cross_entropy(torch.zeros(3), torch.zeros(3, 1))
