"""Muon against torch's own and against a singular value decomposition; which parameter decays; clipping."""

import pytest
import torch
from tiny_training import tiny_model

from hanlin.core.errors import HanlinError
from hanlin.train import settings
from hanlin.train.muon import STACK, Muon, equal_shapes, orthogonalise
from hanlin.train.optim import build_optimizer, clip_gradients, gradient_norm, group_parameters

SHAPES = [(32, 16), (16, 32), (16, 16), (8, 32), (32, 16)]


def random_parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_follows_torch_muon_to_bf16_rounding(nesterov, weight_decay):
    """torch iterates in bf16, one matrix at a time; ours stacked: relative L2 of the moved distance <= 1 %."""
    ours, theirs, start = random_parameters(), random_parameters(), random_parameters()
    one = Muon(ours, lr=0.02, nesterov=nesterov, weight_decay=weight_decay, dtype=torch.bfloat16)
    other = torch.optim.Muon(theirs, lr=0.02, nesterov=nesterov, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() <= 0.01 * (b - s).norm()


def test_newton_schulz_keeps_the_singular_vectors_and_brings_the_values_near_one():
    """Against an SVD in fp64: the polynomial acts on each singular value alone, to 1e-12."""
    generator = torch.Generator().manual_seed(2)
    stack = torch.randn(3, 12, 20, generator=generator, dtype=torch.float64)
    result = orthogonalise(stack)
    U, S, Vh = torch.linalg.svd(stack, full_matrices=False)
    s = S / (S.square().sum(-1, keepdim=True).sqrt() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(result, U @ torch.diag_embed(s) @ Vh, rtol=0, atol=1e-12)
    assert s.min() > 0.6 and s.max() < 1.25


def test_fp32_products_differ_from_fp64_by_rounding_only():
    generator = torch.Generator().manual_seed(3)
    stack = torch.randn(4, 24, 48, generator=generator)
    exact = orthogonalise(stack.double())
    assert (orthogonalise(stack) - exact).norm() <= 1e-4 * exact.norm()


def test_stacks_join_a_shape_with_its_transpose_and_stay_small():
    assert equal_shapes([torch.empty(s) for s in SHAPES]) == [[0, 1, 4], [2], [3]]
    large = torch.empty(STACK // 2 // 64, 64)
    assert equal_shapes([large] * 5) == [[0, 1], [2, 3], [4]]


def test_updates_stay_in_the_fused_buffers():
    """q, k, v and gate, up are views of one buffer each: a replaced parameter would be ignored by the product."""
    for choice in (settings.AdamW(), settings.Muon()):
        model = tiny_model()
        ids = torch.arange(12)[None]
        optimizer = build_optimizer(model, choice, 0.01)
        model(ids).logits.square().sum().backward()
        before = {name: p.data_ptr() for name, p in model.named_parameters()}
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step(1.0)
        assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
        assert all(not torch.equal(p, old[name]) for name, p in model.named_parameters())
        rebuilt = tiny_model(seed=5)
        rebuilt.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(ids).logits, rebuilt(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_kind(tied):
    model = tiny_model(tied=tied)
    groups = group_parameters(model)
    assert list(groups.embeddings) == ["model.embed_tokens.weight"]
    assert list(groups.head) == ([] if tied else ["lm_head.weight"])
    assert all(p.ndim == 1 for p in groups.vectors.values()) and len(groups.vectors) == 5
    assert all("proj" in name for name in groups.matrices) and len(groups.matrices) == 14


def decay_by_name(model, choice) -> dict[str, float]:
    """The share of each parameter's first value that one step at a vanishing gradient takes away."""
    optimizer = build_optimizer(model, choice, 0.5)
    found = {}
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    for name, parameter in model.named_parameters():
        found[name] = round(1.0 - float(parameter.detach().mean()), 6)
    return found


def test_adamw_decays_matrices_and_head_but_not_norms_and_embeddings():
    decays = decay_by_name(tiny_model(), settings.AdamW(weight_decay=0.1))
    assert {d for name, d in decays.items() if "proj" in name or "head" in name} == {0.05}
    assert {d for name, d in decays.items() if "norm" in name or "embed" in name} == {0.0}
    asked = decay_by_name(tiny_model(), settings.AdamW(weight_decay=0.1, decay_embeddings=True))
    assert asked["model.embed_tokens.weight"] == 0.05


def test_muon_decays_the_layers_matrices_only():
    decays = decay_by_name(tiny_model(), settings.Muon(weight_decay=0.1))
    assert {d for name, d in decays.items() if "proj" in name} == {0.05}
    assert {d for name, d in decays.items() if "proj" not in name} == {0.0}


@pytest.mark.parametrize("choice", [settings.AdamW(), settings.Muon()])
def test_a_state_put_into_another_optimiser_continues_the_same(choice):
    models = [tiny_model(), tiny_model()]
    optimizers = [build_optimizer(m, choice, 0.01) for m in models]
    ids = torch.arange(12)[None]

    def step(i):
        models[i].zero_grad()
        models[i](ids).logits.square().sum().backward()
        optimizers[i].step(0.5)

    step(0), step(0)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load(optimizers[0].state())
    step(0), step(1)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_model_is_refused_by_name():
    optimizer = build_optimizer(tiny_model(), settings.AdamW(), 0.01)
    with pytest.raises(HanlinError, match=r"model\.layers\.9\.up/exp_avg"):
        optimizer.load({"model.layers.9.up/exp_avg": torch.zeros(1)})


def test_clipping_is_over_all_gradients_together():
    parameters = random_parameters()
    for p in parameters:
        p.grad = torch.randn_like(p)
    whole = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(gradient_norm(parameters), whole.norm())
    clip_gradients(parameters, float(whole.norm()), 1e6)
    assert torch.equal(torch.cat([p.grad.flatten() for p in parameters]), whole)  # below the limit: untouched
    clip_gradients(parameters, float(whole.norm()), 0.5)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in parameters]), whole * (0.5 / whole.norm()))
