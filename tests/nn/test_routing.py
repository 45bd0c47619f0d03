"""Routers against a walk through the tokens one by one."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.routing import Router, RouterConfig, find_places, route, update_correction

DOUBLE = torch.float64


def route_by_hand(z: list[float], config: RouterConfig, correction: list[float] | None) -> dict[int, float]:
    """Expert -> weight of one token, in plain Python."""
    largest = max(z)
    if config.kind == "sigmoid":
        scores = [1 / (1 + math.exp(-v)) for v in z]
    else:
        powers = [math.exp(v - largest) for v in z]
        scores = [p / sum(powers) for p in powers]
    choice = [s + (correction[e] if correction else 0.0) for e, s in enumerate(scores)]
    size = len(z) // config.groups
    quality = []
    for g in range(config.groups):
        inside = sorted(choice[g * size : (g + 1) * size], reverse=True)
        quality.append(inside[0] if config.group_score == "max" else inside[0] + inside[1])
    best = sorted(range(config.groups), key=lambda g: -quality[g])[: config.top_groups]
    allowed = [e for e in range(len(z)) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: config.top_k]
    total = sum(scores[e] for e in chosen) if config.renormalise else 1.0
    return {e: scores[e] / total * config.scale for e in chosen}


@st.composite
def routers(draw) -> tuple[RouterConfig, int]:
    kind = draw(st.sampled_from(["softmax", "topk_softmax", "sigmoid"]))
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    free = kind != "topk_softmax"
    groups = groups if free else 1
    top_groups = draw(st.integers(1, groups))
    config = RouterConfig(
        top_k=draw(st.integers(1, size * top_groups)),
        kind=kind,
        renormalise=draw(st.booleans()) if free else True,
        scale=draw(st.sampled_from([1.0, 2.5])),
        groups=groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from(["max", "top2"])),
        correction=draw(st.booleans()) if free else False,
    )
    return config, groups * size


@given(routers(), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_every_router_equals_the_walk(router, seed):
    config, count = router
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, count, dtype=DOUBLE, generator=generator)
    correction = torch.randn(count, dtype=DOUBLE, generator=generator) * 0.3 if config.correction else None
    found = route(logits, config, correction)
    assert found.experts.dtype == torch.int64
    for t in range(5):
        expected = route_by_hand(logits[t].tolist(), config, None if correction is None else correction.tolist())
        assert found.experts[t].tolist() == list(expected)  # the same, best first
        weights = torch.tensor(list(expected.values()), dtype=DOUBLE)
        torch.testing.assert_close(found.weights[t], weights, rtol=0, atol=1e-12)


def test_softmax_over_the_chosen_equals_the_renormalised_softmax():
    logits = torch.randn(20, 8, dtype=DOUBLE)
    a, b = (route(logits, RouterConfig(3, kind=kind)) for kind in ("softmax", "topk_softmax"))
    assert torch.equal(a.experts, b.experts)
    torch.testing.assert_close(a.weights, b.weights, rtol=0, atol=1e-14)
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=0)


def test_saturated_sigmoids_are_told_apart():
    found = route(torch.tensor([[30.0, 50.0, 40.0]]), RouterConfig(1, kind="sigmoid", renormalise=False))
    assert found.experts.tolist() == [[1]]
    assert found.weights.tolist() == [[1.0]]


def test_sigmoids_that_are_all_zero_give_zeros_not_nan():
    found = route(torch.full((1, 4), -200.0), RouterConfig(2, kind="sigmoid"))
    assert found.weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("kind", ["softmax", "topk_softmax", "sigmoid"])
def test_low_precision_logits_are_weighed_in_fp32(kind):
    found = route(torch.randn(4, 8).bfloat16(), RouterConfig(2, kind=kind))
    assert found.weights.dtype == found.scores.dtype == torch.float32
    assert found.logits.dtype == torch.bfloat16


def test_the_correction_chooses_and_does_not_weigh():
    logits = torch.zeros(1, 4, dtype=DOUBLE, requires_grad=True)
    correction = torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=DOUBLE, requires_grad=True)
    found = route(logits, RouterConfig(2, kind="sigmoid", renormalise=False, correction=True), correction)
    assert found.experts.tolist() == [[3, 1]]
    assert found.weights.tolist() == [[0.5, 0.5]]
    found.weights.sum().backward()
    assert correction.grad is None
    assert logits.grad.tolist() == [[0.0, 0.25, 0.0, 0.25]]


# ---- the module -----------------------------------------------------------------------------------------------------


def test_wide_logits_are_exact_where_bf16_rounds():
    torch.manual_seed(0)
    narrow, exact = (Router(64, 4, RouterConfig(2, wide=wide)).bfloat16() for wide in (False, True))
    exact.load_state_dict(narrow.state_dict())
    x = torch.randn(5, 64).bfloat16()
    expected = x.double() @ narrow.weight.double().T
    assert exact(x).logits.dtype == torch.float32
    assert (exact(x).logits.double() - expected).abs().max() < 1e-5
    assert (narrow(x).logits.double() - expected).abs().max() > 1e-4


def test_the_correction_stays_in_fp32_whatever_the_module_is_cast_to():
    router = Router(4, 6, RouterConfig(2, kind="sigmoid", correction=True))
    value = torch.full((6,), 1.0) + torch.arange(6) * 1e-3
    router.correction.copy_(value)
    assert torch.equal(router.bfloat16().correction, value)
    assert router.weight.dtype == torch.bfloat16
    assert router.double().correction.dtype == DOUBLE
    assert "correction" in router.state_dict()
    with torch.device("meta"):
        empty = Router(4, 6, RouterConfig(2, kind="sigmoid", correction=True)).bfloat16()
    assert empty.correction.is_meta
    assert empty.correction.dtype == torch.float32


def test_jitter_moves_the_router_in_training_only():
    torch.manual_seed(0)
    router = Router(16, 4, RouterConfig(1, jitter=0.1))
    x = torch.randn(3, 16)
    still = router.eval()(x).logits
    assert torch.equal(router(x).logits, still)
    moved = router.train()(x).logits
    assert not torch.equal(moved, still)
    assert ((moved - still).abs() <= 0.1 * (x.abs() @ router.weight.abs().T)).all()


def places_by_hand(experts: list[list[list[int]]], places: int) -> list[list[list[bool]]]:
    """Row by row, choice by choice, token by token."""
    kept = [[[False] * len(token) for token in row] for row in experts]
    for r, row in enumerate(experts):
        taken: Counter[int] = Counter()
        for j in range(len(row[0])):
            for t, token in enumerate(row):
                kept[r][t][j] = taken[token[j]] < places
                taken[token[j]] += 1
    return kept


@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(3, 5), st.integers(1, 5), st.integers(0, 999)
)
@settings(max_examples=200, deadline=None)
def test_places_go_to_who_comes_first(rows, length, k, count, places, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(rows, length, count, generator=generator).topk(k, -1).indices
    assert find_places(experts, count, places).tolist() == places_by_hand(experts.tolist(), places)


def test_capacity_counts_within_a_row():
    torch.manual_seed(0)
    router = Router(8, 2, RouterConfig(1, capacity=2))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 8))
    kept = router(torch.ones(3, 4, 8)).kept
    assert kept.view(3, 4).tolist() == [[True, True, False, False]] * 3
    assert router(torch.ones(12, 8)).kept.sum() == 2  # without rows: one row
    assert Router(8, 2, RouterConfig(1))(torch.ones(12, 8)).kept is None


@pytest.mark.parametrize(
    ("config", "tokens", "experts", "places"),
    [
        (RouterConfig(1, capacity=64), 5, 8, 64),
        (RouterConfig(1, capacity_factor=1.0), 16, 8, 2),
        (RouterConfig(1, capacity_factor=1.25), 16, 8, 3),  # 2.5, rounded up
        (RouterConfig(2, capacity_factor=1.0), 16, 8, 4),  # GShard: 2 N / E
        (RouterConfig(2), 16, 8, None),
    ],
)
def test_how_many_places_an_expert_has(config: RouterConfig, tokens, experts, places):
    assert config.places(tokens, experts) == places


def test_the_correction_moves_towards_an_even_load():
    correction = torch.tensor([0.1, 0.2, 0.3])
    moved = update_correction(correction, torch.tensor([10, 2, 6]), 0.01)
    torch.testing.assert_close(moved, torch.tensor([0.09, 0.21, 0.3]))
    assert correction.tolist() == torch.tensor([0.1, 0.2, 0.3]).tolist()
    with pytest.raises(HanlinError, match="does not fit"):
        update_correction(correction, torch.ones(4), 0.01)


def test_the_correction_balances_a_skewed_router():
    """A hundred steps of the rule on fixed logits that favour two of eight experts."""
    torch.manual_seed(0)
    config = RouterConfig(2, kind="sigmoid", correction=True)
    logits = torch.randn(512, 8) + torch.tensor([2.0, 2.0, 0, 0, 0, 0, 0, 0])
    correction = torch.zeros(8)

    def load() -> Tensor:
        return torch.bincount(route(logits, config, correction).experts.flatten(), minlength=8)

    before = load()
    for _ in range(100):
        correction = update_correction(correction, load(), 0.01)
    assert before.max() / before.float().mean() > 2
    assert load().max() / load().float().mean() < 1.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "at least one"),
        ({"top_k": 1, "kind": "soft"}, "Unknown router"),
        ({"top_k": 1, "group_score": "mean"}, "Unknown group score"),
        ({"top_k": 1, "groups": 2, "top_groups": 3}, "top_groups"),
        ({"top_k": 1, "kind": "topk_softmax", "renormalise": False}, "always renormalised"),
        ({"top_k": 1, "kind": "topk_softmax", "correction": True}, "always renormalised"),
        ({"top_k": 1, "capacity": 2, "capacity_factor": 1.0}, "not both"),
        ({"top_k": 1, "capacity": 0}, "at least 1 token"),
        ({"top_k": 1, "capacity_factor": 0.0}, "positive"),
        ({"top_k": 1, "jitter": 1.0}, "below 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(HanlinError, match=message):
        RouterConfig(**settings)
