"""Gradient norms and update ratios by kind, of whole parameters and of pieces."""

import pytest
import torch
from tests.train.tiny_training import TinySource, tiny_model

from hanlin.train.monitors import Monitors
from hanlin.train.objective import CausalLM, step_loss
from hanlin.train.optim import build_optimizer, group_parameters
from hanlin.train.settings import AdamW

KINDS = ("matrices", "head", "embeddings", "vectors")


def trained_once():
    model, batch = tiny_model().double(), TinySource(4).batch(0)
    step_loss(CausalLM().loss(model, batch)[0], CausalLM().count(batch)).backward()
    groups = {kind: getattr(group_parameters(model), kind) for kind in KINDS}
    return model, groups, build_optimizer(model, AdamW(), 1e-3)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_norms_and_ratios_are_those_of_all_numbers_of_a_kind():
    """fp64, within 1e-12."""
    _, groups, optimizer = trained_once()
    monitors = Monitors(groups)
    norms = monitors.gradient_norms()
    assert norms.keys() == {f"grad_norm/{kind}" for kind in KINDS}
    before = {kind: flat(named.values()) for kind, named in groups.items()}
    with monitors.watch() as ratios:
        optimizer.step(1.0)
    for kind, named in groups.items():
        assert norms[f"grad_norm/{kind}"] == pytest.approx(
            float(flat(p.grad for p in named.values()).norm()), rel=1e-12
        )
        moved = (flat(named.values()) - before[kind]).norm() / before[kind].norm()
        assert ratios[f"update_ratio/{kind}"] == pytest.approx(float(moved), rel=1e-12)
    assert 1e-4 < ratios["update_ratio/matrices"] < 1e-1


def test_pieces_of_two_ranks_give_the_same_as_the_whole():
    """Each rank holds half of each matrix, and all of the vectors."""
    _, groups, _ = trained_once()
    whole = Monitors(groups).gradient_norms()

    def half(rank, p):
        piece = p.detach().flatten().chunk(2)[rank].clone()
        piece.grad = p.grad.flatten().chunk(2)[rank].clone()
        return piece

    shares = dict.fromkeys(groups["vectors"], 0.5)
    ranks = [
        {
            kind: {n: p if kind == "vectors" else half(rank, p) for n, p in named.items()}
            for kind, named in groups.items()
        }
        for rank in range(2)
    ]
    sums = []
    for rank in range(2):
        Monitors(ranks[rank], shares=shares, total=lambda t: sums.append(t.clone()) or t).gradient_norms()
    joined = Monitors(ranks[0], shares=shares, total=lambda t: t + sums[1]).gradient_norms()
    assert joined == pytest.approx(whole, rel=1e-12)


def test_parameters_without_a_gradient_or_without_weight_count_as_zero():
    zero, moved = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
    monitors = Monitors({"still": {"zero": zero}, "moved": {"moved": moved}, "none": {}})
    assert set(monitors.gradient_norms().values()) == {0.0}
    with monitors.watch() as ratios:
        moved.data.add_(1.0)
    assert ratios == {"update_ratio/still": 0.0, "update_ratio/moved": float("inf"), "update_ratio/none": 0.0}
