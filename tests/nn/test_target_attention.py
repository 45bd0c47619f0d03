"""Target attention against a loop over users and items in fp64."""

import math

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.nn.target_attention import Dice, TargetAttention

EXACT = {"rtol": 0, "atol": 1e-10}
VALID = torch.tensor([[True] * 5, [False, True, True, False, False], [False] * 5, [True, False, False, False, True]])


def make(**settings) -> tuple[TargetAttention, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = TargetAttention(3, (6, 4), **settings).double()
    for parameter in layer.parameters():
        parameter.data.normal_(0.1, 0.6)
    for name, buffer in layer.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    candidate, sequence = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    return layer, candidate.requires_grad_(), sequence.requires_grad_()


def by_loops(layer: TargetAttention, candidate, sequence, valid) -> torch.Tensor:
    """Evaluation: one user, one item, one layer at a time."""
    out = []
    for q, items, real in zip(candidate, sequence, valid, strict=True):
        scores, seen = [], []
        for k, there in zip(items, real, strict=True):
            if not there:
                continue
            x = torch.stack(
                [*q, *k, *(a - b for a, b in zip(q, k, strict=True)), *(a * b for a, b in zip(q, k, strict=True))]
            )
            for index, linear in enumerate(layer.layers):
                x = linear.weight @ x + linear.bias
                if layer.dices is not None:
                    dice = layer.dices[index]
                    p = 1 / (1 + torch.exp(-(x - dice.norm.running_mean) / (dice.norm.running_var + 1e-8).sqrt()))
                    x = p * x + (1 - p) * dice.alpha * x
                else:
                    x = x / (1 + torch.exp(-x))
            scores.append((layer.score.weight @ x + layer.score.bias)[0])
            seen.append(k)
        if layer.softmax and scores:
            total = sum(s.exp() for s in scores)
            scores = [s.exp() / total for s in scores]
        out.append(sum((s * k for s, k in zip(scores, seen, strict=True)), torch.zeros(3, dtype=torch.float64)))
    return torch.stack(out)


@pytest.mark.parametrize("softmax", [False, True], ids=["sums", "softmax"])
@pytest.mark.parametrize("activation", ["dice", "silu"])
def test_it_equals_the_loops(activation, softmax):
    layer, candidate, sequence = make(activation=activation, softmax=softmax)
    layer.eval()
    out, expected = layer(candidate, sequence, VALID), by_loops(layer, candidate, sequence, VALID)
    torch.testing.assert_close(out, expected, **EXACT)
    inputs, direction = (candidate, sequence, *layer.parameters()), torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)
    everything = torch.ones_like(VALID)
    torch.testing.assert_close(layer(candidate, sequence), by_loops(layer, candidate, sequence, everything), **EXACT)


def test_weights_do_not_sum_to_1_unless_asked_to():
    layer, candidate, sequence = make(activation="silu")
    assert (layer.weights(candidate, sequence).sum(1) - 1).abs().min() > 1e-3
    layer.softmax = True
    torch.testing.assert_close(layer.weights(candidate, sequence).sum(1), torch.ones(4, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_stands_at_padding_changes_nothing(training):
    layer, candidate, sequence = make()
    layer.train(training)
    out = layer(candidate, sequence, VALID)
    other = torch.where(VALID[..., None], sequence, 1e3)
    torch.testing.assert_close(layer(candidate, other, VALID), out, **EXACT)
    assert torch.equal(out[2], torch.zeros(3, dtype=torch.float64))


def test_the_weight_depends_on_the_candidate():
    layer, candidate, sequence = make(activation="silu")
    assert (layer.weights(candidate, sequence) - layer.weights(candidate.flip(0), sequence)).abs().max() > 1e-2


def test_dice_bends_where_the_data_are():
    """In training the numbers around the mean of the batch are bent, wherever that mean lies."""
    torch.manual_seed(1)
    dice = Dice(2, eps=1e-8).double()
    dice.alpha.data = torch.tensor([0.3, -0.2], dtype=torch.float64)
    x = torch.randn(50, 2, dtype=torch.float64) * 3 + 7
    out = dice(x)
    for column in range(2):
        values = x[:, column].tolist()
        mean = sum(values) / 50
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 50 + 1e-8)
        for value, found in zip(values, out[:, column].tolist(), strict=True):
            p = 1 / (1 + math.exp(-(value - mean) / deviation))
            assert found == pytest.approx(p * value + (1 - p) * dice.alpha[column].item() * value, abs=1e-10)


def test_a_user_without_items_is_no_nan_in_training():
    layer, candidate, sequence = make(activation="silu", softmax=True)
    layer(candidate, sequence, VALID).sum().backward()
    for x in (candidate, sequence, *layer.parameters()):
        assert torch.isfinite(x.grad).all()


def test_wrong_shapes_are_refused():
    layer = TargetAttention(3)
    with pytest.raises(HanlinError, match=r"\(rows, 3\)"):
        layer(torch.ones(2, 4), torch.ones(2, 5, 3))
    with pytest.raises(HanlinError, match="width 3"):
        layer(torch.ones(2, 4), torch.ones(2, 5, 4))
    with pytest.raises(HanlinError, match="bool"):
        layer(torch.ones(2, 3), torch.ones(2, 5, 3), torch.ones(2, 5))
    with pytest.raises(HanlinError, match="dicee"):
        TargetAttention(3, activation="dicee")
