"""Muon against torch's own and against a singular value decomposition; which parameter decays; clipping."""

import pytest
import torch
from tiny_training import tiny_model

from hanlin.core.errors import HanlinError
from hanlin.train import choices as settings
from hanlin.train.muon import STACK, Muon, equal_shapes, orthogonalise
from hanlin.train.optim import build_optimizer, clip_gradients, gradient_norm, group_parameters

ALL = [
    settings.AdamW(), settings.AdamW(state_bits=8), settings.Muon(), settings.Muon(state_bits=8), settings.SGD(),
    settings.SGD(momentum=0), settings.SGD(nesterov=True), settings.Adafactor(), settings.Adafactor(momentum=0.9),
]  # fmt: skip
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
    for choice in ALL:
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


@pytest.mark.parametrize(
    "choice", [settings.AdamW(weight_decay=0.1, state_bits=8), settings.Adafactor(weight_decay=0.1)]
)
def test_the_other_optimisers_decay_the_same(choice):
    decays = decay_by_name(tiny_model(), choice)
    assert {d for name, d in decays.items() if "proj" in name or "head" in name} == {0.05}
    assert {d for name, d in decays.items() if "norm" in name or "embed" in name} == {0.0}


def test_sgd_is_the_textbooks():
    """v = mu v + g + decay w, w -= lr (g + mu v) or lr v, by hand in fp64: 1e-12. Decay for matrices and head only."""
    for nesterov in (False, True):
        model = tiny_model().double()
        choice = settings.SGD(momentum=0.8, nesterov=nesterov, weight_decay=0.1)
        optimizer = build_optimizer(model, choice, 0.05)
        expected = {name: p.detach().clone() for name, p in model.named_parameters()}
        speed: dict[str, torch.Tensor] = {}
        for _ in range(4):
            for name, p in model.named_parameters():
                p.grad = torch.randn_like(p)
                decay = 0.1 if "proj" in name or "head" in name else 0.0
                g = p.grad + decay * expected[name]
                speed[name] = 0.8 * speed[name] + g if name in speed else g.clone()
                expected[name] -= 0.05 * (g + 0.8 * speed[name] if nesterov else speed[name])
            optimizer.step(1.0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="set momentum above 0"):
        settings.SGD(momentum=0, nesterov=True)


@pytest.mark.parametrize(
    "choice",
    [
        settings.AdamW(embedding_lr_ratio=0.25), settings.AdamW(embedding_lr_ratio=0.25, state_bits=8),
        settings.Muon(embedding_lr_ratio=0.25, adam_lr_ratio=1.0), settings.SGD(embedding_lr_ratio=0.25),
        settings.Adafactor(embedding_lr_ratio=0.25),
    ],
    ids=lambda choice: choice.kind,
)  # fmt: skip
def test_embeddings_have_a_rate_of_their_own(choice):
    """A quarter of the rate moves them a quarter as far; nothing else moves differently (fp64, 1e-12)."""
    steps = []
    for chosen in (choice, choice.model_copy(update={"embedding_lr_ratio": 1.0})):
        model = tiny_model().double()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        build_optimizer(model, chosen, 1e-3).step(1.0)
        steps.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, step in steps[0].items():
        ratio = 0.25 if "embed" in name else 1.0
        torch.testing.assert_close(step, ratio * steps[1][name], rtol=0, atol=1e-12)


def test_eight_bit_states_are_a_quarter_of_the_size():
    """Of the matrices and the head: 2 bytes a number and 8 a block, against 8 bytes."""
    model, sizes = tiny_model(), []
    for bits in (8, 32):
        optimizer = build_optimizer(model, settings.AdamW(state_bits=bits), 1e-3)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1.0)
        large = {n: t for n, t in optimizer.state().items() if ("proj" in n or "head" in n) and not n.endswith("/step")}
        sizes.append(sum(t.numel() * t.element_size() for t in large.values()))
    assert 0.25 < sizes[0] / sizes[1] < 0.26


def test_muon_decays_the_layers_matrices_only():
    decays = decay_by_name(tiny_model(), settings.Muon(weight_decay=0.1))
    assert {d for name, d in decays.items() if "proj" in name} == {0.05}
    assert {d for name, d in decays.items() if "proj" not in name} == {0.0}


@pytest.mark.parametrize("choice", ALL, ids=str)
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
