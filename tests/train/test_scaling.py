"""The dynamic loss scale: torch's own scales from the same flags, and a model that survives a planted overflow."""

import pytest
import torch
from tiny_training import TinySource, tiny_model

from hanlin.core.errors import HanlinError
from hanlin.train.choices import AdamW
from hanlin.train.objective import document_mask
from hanlin.train.optim import build_optimizer
from hanlin.train.precision import Precision, training_mode
from hanlin.train.scaling import LossScale, unscale_gradients
from hanlin.train.token_loss import token_loss


def test_the_scale_goes_the_way_of_torchs():
    """300 random flags, growth every 5 good steps: equal after each."""
    generator = torch.Generator().manual_seed(0)
    ours = LossScale(2.0**10, interval=5, smallest=2.0**-60)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for _ in range(300):
        overflow = bool(torch.rand((), generator=generator) < 0.25)
        theirs.scale(torch.ones(()))
        weight.grad = torch.full((3,), float("inf") if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflow)
        assert ours.scale == theirs.get_scale()


def test_gradients_are_divided_and_every_kind_of_overflow_is_found():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        parameters = [torch.nn.Parameter(torch.randn(n, generator=generator, dtype=dtype)) for n in (1, 7, 300)]
        parameters.append(torch.nn.Parameter(torch.zeros(2)))  # without a gradient
        for p in parameters[:3]:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        expected = [p.grad / 1024 for p in parameters[:3]]
        assert unscale_gradients(parameters, 1024.0) == 0
        for p, grad in zip(parameters, expected, strict=False):
            assert torch.equal(p.grad, grad)
        for bad in (float("inf"), float("-inf"), float("nan")):
            parameters[2].grad[123] = bad
            assert unscale_gradients(parameters, 1024.0) == 1


def test_a_loaded_scale_goes_on_where_it_was():
    one = LossScale(interval=3)
    for flag in (True, False, False):
        one.update(flag)
    other = LossScale(interval=3)
    other.load(one.state())
    for scale in (one, other):
        scale.update(False)
    assert one.state() == other.state() == {"scale": 2.0**16, "good": 0, "skipped": 1}


def test_a_scale_that_falls_for_ever_ends_the_run():
    scale = LossScale(1.0, smallest=0.25)
    scale.update(True)
    scale.update(True)
    with pytest.raises(HanlinError, match="gradients overflow at any scale"):
        scale.update(True)


def losses(scale: LossScale, steps: int = 40) -> list[float]:
    """Train the tiny model in fp16; a step that overflows is made again at the smaller scale."""
    model, data = tiny_model(), TinySource(8)
    optimizer = build_optimizer(model, AdamW(), 1e-2)
    found: list[float] = []
    with training_mode(model, precision=Precision("fp16")):
        assert model.dtype == torch.float16 and next(model.parameters()).dtype == torch.float32
        while len(found) < steps:
            batch = data.batch(len(found) % 4)
            model.zero_grad()
            hidden = model(batch.ids, positions=batch.positions, mask=document_mask(batch), logits=None).hidden
            loss = token_loss(model, hidden, batch.targets) / 50
            (loss * scale.scale).backward()
            overflowed = bool(unscale_gradients(model.parameters(), scale.scale))
            scale.update(overflowed)
            if not overflowed:
                optimizer.step(1.0)
                found.append(float(loss.detach()))
    assert model.compute_dtype is None
    return found


def test_a_planted_overflow_costs_its_step_and_nothing_else():
    """A first scale at which finite gradients overflow, growing back every 10 steps: the losses are those of a scale
    that never overflows, within 5 % over 40 steps of fp16's rounding, and they fall."""
    calm, rough = LossScale(2.0**8, interval=1000), LossScale(2.0**24, interval=10)
    expected, found = losses(calm), losses(rough)
    assert calm.skipped == 0 and rough.skipped > 3
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0.05, atol=0.05)
    assert found[-1] < 0.5 * found[3]


def test_small_gradients_live_by_the_scale():
    """Gradients of some 1e-9 in fp16 activations: zero without a scale, right with one (5 %)."""
    model, batch = tiny_model(), TinySource(4).batch(0)
    wanted, grads = [p for n, p in model.named_parameters() if "layers.0.mlp" in n], {}
    for name, dtype, scale in (("exact", None, 1.0), ("lost", torch.float16, 1.0), ("saved", torch.float16, 2.0**24)):
        model.compute_dtype = dtype
        hidden = model(batch.ids, positions=batch.positions, mask=document_mask(batch), logits=None).hidden
        loss = token_loss(model, hidden, batch.targets) * 1e-9 * scale
        grads[name] = [g / scale for g in torch.autograd.grad(loss, wanted)]
    for exact, lost, saved in zip(grads["exact"], grads["lost"], grads["saved"], strict=True):
        assert lost.norm() < 0.1 * exact.norm()
        assert (saved - exact).norm() < 0.05 * exact.norm()
