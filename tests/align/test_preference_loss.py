"""Preference losses beside formulas written out, where they fall together, and what must not change them."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from hanlin.align.preference_loss import (
    LINKS,
    kto_anchor,
    kto_loss,
    preference_loss,
    rahf_loss,
    rahf_target,
    rrhf_loss,
)
from hanlin.core.errors import HanlinError

BETA = 0.3
KNOBS = {
    "cdpo": {"smoothing": 0.2}, "robust": {"smoothing": 0.2}, "dpop": {"penalty": 5.0}, "simpo": {"gamma": 0.4},
}  # fmt: skip
NUMBERS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "divergence_chosen", "divergence_rejected")


def pairs(n: int = 6, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    said = {name: -3 * torch.rand(n, dtype=torch.float64) - 0.1 for name in NUMBERS[:4]}
    return said | {name: torch.rand(n, dtype=torch.float64) for name in NUMBERS[4:]}


def compute(kind: str, given: dict[str, Tensor], **knobs: object) -> Tensor:
    return preference_loss(**given, kind=kind, beta=BETA, **(KNOBS.get(kind, {}) | knobs))[0]  # ty: ignore


def graded(kind: str, given: dict[str, Tensor], **knobs: object) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    total = compute(kind, leaves, **knobs)
    slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return total.detach(), dict(zip(leaves, slopes, strict=True))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def in_words(kind: str, w: float, l: float, rw: float, rl: float, dw: float, dl: float) -> float:  # noqa: E741
    """One pair, from the paper."""
    delta = (w - rw) - (l - rl)
    if kind == "dpo":
        return -log_sigmoid(BETA * delta)
    if kind in ("cdpo", "robust"):
        right, wrong = -log_sigmoid(BETA * delta), -log_sigmoid(-BETA * delta)
        return 0.8 * right + 0.2 * wrong if kind == "cdpo" else (0.8 * right - 0.2 * wrong) / (1 - 0.4)
    if kind == "hinge":
        return max(0.0, 1 - BETA * delta)
    if kind == "ipo":
        return (delta - 1 / (2 * BETA)) ** 2
    if kind == "dpop":
        return -log_sigmoid(BETA * (delta - 5.0 * max(0.0, rw - w)))
    if kind in ("tdpo1", "tdpo2"):
        return -log_sigmoid(BETA * (delta - (1.0 if kind == "tdpo1" else 0.5) * (dl - dw)))
    if kind == "simpo":
        return -log_sigmoid(BETA * (w - l) - 0.4)
    odds = [math.exp(x) / (1 - math.exp(x)) for x in (w, l)]
    return -BETA * log_sigmoid(math.log(odds[0] / odds[1]))


@pytest.mark.parametrize("kind", list(LINKS))
def test_equals_the_formula_pair_by_pair(kind: str) -> None:
    given = pairs()
    wanted = sum(in_words(kind, *(float(given[name][n]) for name in NUMBERS)) for n in range(6))
    assert abs(float(compute(kind, given)) - wanted) < 1e-12


@pytest.mark.parametrize("kind", list(LINKS))
def test_parts_and_order_change_nothing(kind: str) -> None:
    given = pairs()
    margin = torch.linspace(0, 1, 6, dtype=torch.float64)
    whole, slopes = graded(kind, given, margin=margin)
    for cuts in ([0, 6], [0, 3, 6], [0, 1, 2, 5, 6]):
        parts = [
            graded(kind, {name: x[i:j] for name, x in given.items()}, margin=margin[i:j])
            for i, j in itertools.pairwise(cuts)
        ]
        assert abs(sum(total for total, _ in parts) - whole) < 1e-12
        for name in NUMBERS:
            assert (torch.cat([s[name] for _, s in parts]) - slopes[name]).abs().max() < 1e-12
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    again, moved = graded(kind, {name: x[order] for name, x in given.items()}, margin=margin[order])
    assert abs(again - whole) < 1e-12
    assert all((moved[name] - slopes[name][order]).abs().max() < 1e-12 for name in NUMBERS)


@pytest.mark.parametrize("kind", ["dpo", "cdpo", "robust", "dpop", "tdpo1", "tdpo2"])
def test_before_the_first_step_the_loss_is_log_2(kind: str) -> None:
    given = pairs()
    given |= {"ref_chosen": given["chosen"].clone(), "ref_rejected": given["rejected"].clone()}
    given |= {name: torch.zeros(6, dtype=torch.float64) for name in NUMBERS[4:]}
    total, metrics = preference_loss(**given, kind=kind, beta=BETA, **KNOBS.get(kind, {}))  # ty: ignore
    assert abs(float(total) - 6 * math.log(2)) < 1e-12
    assert metrics["rewards/margin"] == (0.0, 6.0) and metrics["rewards/accuracy"] == (0.0, 6.0)


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [("dpop", {"penalty": 0.0}), ("tdpo1", {"alpha": 0.0}), ("tdpo2", {"alpha": 0.0}), ("cdpo", {"smoothing": 0.0}),
     ("robust", {"smoothing": 0.0})],
)  # fmt: skip
def test_with_nothing_added_it_is_dpo(kind: str, knobs: dict) -> None:
    plain, slopes = graded("dpo", pairs())
    total, same = graded(kind, pairs(), **knobs)
    assert abs(total - plain) < 1e-12
    assert all((same[name] - slopes[name]).abs().max() < 1e-12 for name in NUMBERS[:2])


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """arXiv:2403.00409: (1 - s) robust(delta) + s robust(-delta) = dpo(delta)."""
    given = pairs()
    flipped = dict(
        zip(NUMBERS, (given[name] for name in (NUMBERS[1], NUMBERS[0], NUMBERS[3], NUMBERS[2])), strict=False)
    )
    mean = 0.8 * compute("robust", given) + 0.2 * compute("robust", flipped)
    assert abs(float(mean - compute("dpo", given))) < 1e-12


def test_dpop_pulls_the_chosen_answer_up_only_where_it_has_lost() -> None:
    given = pairs(2)
    given["chosen"] = given["ref_chosen"] + torch.tensor([0.5, -0.5])
    _, slopes = graded("dpop", given)
    _, plain = graded("dpo", given)
    assert abs(slopes["chosen"][0] - plain["chosen"][0]) < 1e-12
    assert slopes["chosen"][1] < 5 * plain["chosen"][1] < 0
    assert -slopes["chosen"][1] > 5 * slopes["rejected"][1]  # 1 + lambda times the pull on the rejected one


def test_tdpo_2_takes_the_chosen_divergence_as_given() -> None:
    _, first = graded("tdpo1", pairs())
    _, second = graded("tdpo2", pairs())
    assert (first["divergence_chosen"] + first["divergence_rejected"]).abs().max() < 1e-12
    assert (first["divergence_rejected"] > 0).all()
    assert not second["divergence_chosen"].any() and (second["divergence_rejected"] > 0).all()


@pytest.mark.parametrize("kind", list(LINKS))
def test_references_get_no_gradient_and_equal_answers_no_preference(kind: str) -> None:
    given = pairs()
    for side in ("", "ref_"):
        given[f"{side}rejected"] = given[f"{side}chosen"].clone()
    given["divergence_rejected"] = given["divergence_chosen"].clone()
    total, slopes = graded(kind, given, penalty=0.0)
    assert total.isfinite()
    assert not slopes["ref_chosen"].any() and not slopes["ref_rejected"].any()
    assert (slopes["chosen"] + slopes["rejected"]).abs().max() < 1e-12
    _, metrics = preference_loss(**given, kind=kind, beta=BETA)
    assert metrics["rewards/accuracy"] == (0.0, 6.0)


@pytest.mark.parametrize("kind", ["dpo", "hinge", "simpo", "orpo", "tdpo2"])
def test_a_margin_is_a_lead_that_does_not_count(kind: str) -> None:
    given = pairs()
    margin = torch.rand(6, dtype=torch.float64)
    assert abs(float(compute(kind, given, margin=0.0) - compute(kind, given))) < 1e-12
    assert float(compute(kind, given, margin=margin)) > float(compute(kind, given))
    if kind != "orpo":  # where the lead is linear in the chosen log-probability
        shifted = given | {"chosen": given["chosen"] + margin / BETA}
        assert abs(float(compute(kind, shifted, margin=margin) - compute(kind, given))) < 1e-12


def test_an_answer_that_is_certain_keeps_orpo_finite() -> None:
    chosen = torch.tensor([0.0, -1e-9, -200.0], requires_grad=True)
    rejected = torch.tensor([-200.0, 0.0, -1e-9], requires_grad=True)
    total, _ = preference_loss(chosen, rejected, kind="orpo")
    total.backward()
    assert total.isfinite()
    assert chosen.grad is not None and chosen.grad.isfinite().all()
    assert rejected.grad is not None and rejected.grad.isfinite().all()


def test_metrics_are_rewards_over_pairs() -> None:
    given = pairs()
    _, metrics = preference_loss(**given, kind="dpo", beta=BETA)
    chosen, rejected = (BETA * (given[side] - given[f"ref_{side}"]) for side in ("chosen", "rejected"))
    assert metrics["rewards/accuracy"] == (float((chosen > rejected).sum()), 6.0)
    assert metrics["rewards/margin"] == (pytest.approx(float((chosen - rejected).sum())), 6.0)
    assert metrics["rewards/chosen"] == (pytest.approx(float(chosen.sum())), 6.0)
    assert metrics["rewards/rejected"] == (pytest.approx(float(rejected.sum())), 6.0)
    nothing = torch.zeros(0)
    assert preference_loss(nothing, nothing)[1] == {} and float(preference_loss(nothing, nothing)[0]) == 0


def test_what_cannot_be_asked_for_is_refused_by_name() -> None:
    given = pairs()
    with pytest.raises(HanlinError, match="dpo"):
        preference_loss(**given, kind="ppo")
    with pytest.raises(HanlinError, match="smoothing"):
        preference_loss(**given, kind="robust", smoothing=0.5)
    with pytest.raises(HanlinError, match="divergence"):
        preference_loss(given["chosen"], given["rejected"], kind="tdpo2")


def test_kto_equals_its_formula_and_measures_from_a_fixed_point() -> None:
    torch.manual_seed(4)
    change = torch.randn(6, dtype=torch.float64, requires_grad=True)
    good = torch.tensor([True, False, True, True, False, False])
    for z in (0.4, -0.7):
        anchor = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        total, metrics = kto_loss(change, good, anchor, beta=BETA, good_weight=1.5, bad_weight=0.5)
        floor, wanted = max(z, 0.0), 0.0
        for d, is_good in zip(change.tolist(), good.tolist(), strict=True):
            lead = d - floor if is_good else floor - d
            wanted += (1.5 if is_good else 0.5) * (1 - 1 / (1 + math.exp(-BETA * lead)))
        assert abs(float(total.detach()) - wanted) < 1e-12
        slope, of_anchor = torch.autograd.grad(total, (change, anchor), allow_unused=True)
        assert of_anchor is None
        assert (slope[good] < 0).all() and (slope[~good] > 0).all()
        assert metrics["rewards/chosen"] == (pytest.approx(float(BETA * change.detach()[good].sum())), 3.0)
    part = [kto_loss(change.detach()[i], good[i], torch.full((3,), 0.4), beta=BETA)[0] for i in (slice(3), slice(3, 6))]
    assert abs(float(sum(part) - kto_loss(change.detach(), good, 0.4, beta=BETA)[0])) < 1e-7  # 0.4 in fp32 and fp64
    assert torch.equal(kto_anchor(change[:2]) + kto_anchor(change[2:]), kto_anchor(change)) or (
        (kto_anchor(change[:2]) + kto_anchor(change[2:]) - kto_anchor(change)).abs().max() < 1e-12
    )


def test_rrhf_ranks_every_pair_of_a_group_with_unequal_scores() -> None:
    torch.manual_seed(5)
    said = torch.randn(9, dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.5, 0.1, 0.7, 0.7, 0.7])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    total, metrics = rrhf_loss(said, scores, group)
    wanted, right, ranked = 0.0, 0, 0
    p = said.tolist()
    for i, j in itertools.permutations(range(9), 2):
        if group[i] == group[j] and scores[i] < scores[j]:
            wanted += max(0.0, p[i] - p[j])
            right, ranked = right + (p[j] > p[i]), ranked + 1
    assert abs(float(total.detach()) - wanted) < 1e-12
    assert metrics == {"accuracy": (float(right), float(ranked))} and ranked == 6
    total.backward()
    assert said.grad is not None and not said.grad[6:].any()
    order = torch.randperm(9)
    assert abs(float(rrhf_loss(said.detach()[order], scores[order], group[order])[0]) - wanted) < 1e-12


def test_rahf_is_the_distance_to_the_base_moved_along_the_direction() -> None:
    torch.manual_seed(6)
    hidden, base, good, bad = (torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4))
    target = rahf_target(base, good, bad, 5.0)
    total = rahf_loss(hidden, target)
    wanted = 0.0
    for t, layer in itertools.product(range(5), range(2)):
        away = (hidden - base - 5.0 * (good - bad))[t, layer].tolist()
        wanted += math.sqrt(sum(x * x for x in away)) / 2
    assert abs(float(total.detach()) - wanted) < 1e-12
    total.backward()
    assert hidden.grad is not None and all(x.grad is None for x in (base, good, bad))
    assert (
        abs(float(rahf_loss(hidden[:2], target[:2]).detach() + rahf_loss(hidden[2:], target[2:]).detach()) - wanted)
        < 1e-12
    )
    at_target = target.clone().requires_grad_()
    rahf_loss(at_target, target).backward()
    assert at_target.grad is not None and not at_target.grad.any()
