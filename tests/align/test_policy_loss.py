"""Policy losses beside loops written from the formulas, and what must not change them: splitting, order, padding."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from hanlin.align.policy_loss import FORMS, explained_variance, kl_estimate, policy_loss, rollout_weights, value_loss
from hanlin.align.sequence_sums import aggregate, mean_by_sequence, sum_by_sequence
from hanlin.core.errors import HanlinError

LEVELS = ("token", "sequence", "sequence_sum")
HOW = ("token", "sequence", "constant")
VARIANTS = list(itertools.product(LEVELS, FORMS, HOW))
CLIP = (0.2, 0.28)
LENGTHS = (3, 1, 6, 2)


def ragged(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, old, advantages (a number a token), sequence; ratios inside, below and above any clip."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = -3 * torch.rand(n, generator=generator, dtype=torch.float64) - 0.01
    old = logp + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    return logp, old, advantages, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def graded(logp: Tensor, *rest: object, **knobs: object) -> tuple[Tensor, Tensor]:
    leaf = logp.clone().requires_grad_()
    total, _ = policy_loss(leaf, *rest, **knobs)  # ty: ignore
    return total.detach(), torch.autograd.grad(total, leaf)[0]


def in_words(logp: Tensor, old: Tensor, advantages: Tensor, sequence: Tensor, count: int, *, level: str, form: str,
             how: str, dual: float | None, length: float) -> float:  # fmt: skip
    """The same with one Python number at a time."""
    low, high = CLIP
    tokens = [
        (float(p), float(q), float(a), int(s)) for p, q, a, s in zip(logp, old, advantages, sequence, strict=True)
    ]
    total = 0.0
    for answer in range(count):
        own = [(p, q, a) for p, q, a, s in tokens if s == answer]
        change = sum(p - q for p, q, _ in own)
        costs = []
        for p, q, a in own:
            ratio = math.exp({"token": p - q, "sequence": change / len(own), "sequence_sum": change}[level])
            bounded = min(max(ratio, 1 - low), 1 + high)
            if form == "none":
                cost = -a * p
            elif form == "cispo":
                cost = -bounded * a * p
            elif form == "dppo":
                moved = math.exp(p) - math.exp(q)
                inside = moved <= high if a > 0 else moved >= -low
                cost = -min(ratio, dual or math.inf) * a * p if inside else 0.0
            else:
                cost = -min(ratio * a, bounded * a)
                if dual is not None and a < 0:
                    cost = min(cost, -dual * a)
            costs.append(cost)
        if costs:
            total += {"token": sum(costs), "sequence": sum(costs) / len(costs), "constant": sum(costs) / length}[how]
    return total


@pytest.mark.parametrize(("level", "form", "how"), VARIANTS)
@pytest.mark.parametrize("dual", [None, 1.4])
def test_equals_the_formula_token_by_token(level: str, form: str, how: str, dual: float | None) -> None:
    logp, old, advantages, sequence = ragged()
    wanted = in_words(logp, old, advantages, sequence, 4, level=level, form=form, how=how, dual=dual, length=5.0)
    knobs = {"level": level, "form": form, "aggregate": how, "length": 5.0, "dual": dual, "clip": CLIP}
    found, _ = policy_loss(logp, old, advantages, sequence, 4, **knobs)
    assert abs(float(found) - wanted) < 1e-12


@pytest.mark.parametrize(("level", "form", "how"), VARIANTS)
def test_parts_order_padding_and_empty_sequences_change_nothing(level: str, form: str, how: str) -> None:
    knobs = {"level": level, "form": form, "aggregate": how, "length": 5.0, "clip": CLIP}
    logp, old, advantages, sequence = ragged()
    whole, slope = graded(logp, old, advantages, sequence, 4, **knobs)

    for cuts in ([0, 4], [0, 2, 4], [0, 1, 2, 3, 4]):  # 1, 2 and 4 micro-batches
        parts = []
        for start, stop in itertools.pairwise(cuts):
            own = (sequence >= start) & (sequence < stop)
            parts.append(graded(logp[own], old[own], advantages[own], sequence[own] - start, stop - start, **knobs))
        assert abs(sum(p for p, _ in parts) - whole) < 1e-12
        assert (torch.cat([g for _, g in parts]) - slope).abs().max() < 1e-12

    order = torch.cat([(sequence == s).nonzero()[:, 0] for s in (2, 0, 3, 1)])
    places = torch.tensor([1, 3, 0, 2])[sequence[order]]
    total, moved = graded(logp[order], old[order], advantages[order], places, 4, **knobs)
    assert abs(total - whole) < 1e-12
    assert (moved - slope[order]).abs().max() < 1e-12

    with_empty, same = graded(logp, old, advantages, torch.tensor([0, 3, 4, 6])[sequence], 8, **knobs)
    assert abs(with_empty - whole) < 1e-12
    assert torch.equal(same, slope)

    for side in ("left", "right"):  # whatever stands in the padding, it is never looked at
        place = torch.arange(6)
        lengths = torch.tensor(LENGTHS)[:, None]
        mask = place >= 6 - lengths if side == "left" else place < lengths
        table = torch.full((4, 6), torch.nan, dtype=torch.float64).masked_scatter(mask, logp).requires_grad_()
        padded, _ = policy_loss(table[mask], old, advantages, mask.nonzero()[:, 0], 4, **knobs)
        padded.backward()
        assert torch.equal(padded.detach(), whole)
        assert table.grad is not None and torch.equal(table.grad[mask], slope) and not table.grad[~mask].any()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_the_gradient_is_that_of_reinforce(level: str, how: str) -> None:
    logp, _, advantages, sequence = ragged()
    advantages = advantages[:4][sequence]  # one an answer, as GRPO has them
    knobs = {"aggregate": how, "length": 5.0}
    _, plain = graded(logp, None, advantages, sequence, 4, form="none", **knobs)
    for old in (None, logp.clone()):
        _, clipped = graded(logp, old, advantages, sequence, 4, level=level, dual=3.0, **knobs)
        assert (clipped - plain).abs().max() < 1e-12
    total, _ = policy_loss(logp, None, advantages, sequence, 4, level=level, **knobs)  # the ratio is exactly 1
    assert float(total) == float(aggregate(-advantages, sequence, 4, how, 5.0))


def test_the_ratio_of_an_answer_has_the_gradient_of_its_log_probability() -> None:
    logp, _, advantages, sequence = ragged()
    advantages = advantages[:4][sequence]
    _, plain = graded(logp, None, advantages, sequence, 4, form="none")
    _, answer = graded(logp, None, advantages, sequence, 4, level="sequence_sum", aggregate="sequence")
    assert (answer - plain).abs().max() < 1e-12


@pytest.mark.parametrize("form", list(FORMS))
def test_only_the_policy_gets_a_gradient(form: str) -> None:
    logp, old, advantages, sequence = (x.requires_grad_() if x.is_floating_point() else x for x in ragged())
    weight = torch.rand(len(logp), dtype=torch.float64, requires_grad=True)
    policy_loss(logp, old, advantages, sequence, 4, form=form, weight=weight)[0].backward()
    assert logp.grad is not None and logp.grad.any()
    assert old.grad is None and advantages.grad is None and weight.grad is None


def test_no_tokens_make_no_loss_and_no_nan() -> None:
    nothing, sequence = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for how in HOW:
        total, metrics = policy_loss(nothing, None, nothing, sequence, 3, aggregate=how, length=4, level="sequence")
        total.backward()
        assert float(total.detach()) == 0 and metrics == {}
    assert value_loss(nothing, nothing, nothing, sequence, 0, clip=0.2)[1] == {}
    assert rollout_weights(nothing, nothing, sequence, 0)[1] == {}


def test_hopeless_ratios_stay_finite() -> None:
    logp = torch.tensor([-0.1, -500.0], dtype=torch.bfloat16, requires_grad=True)
    old = torch.tensor([-900.0, -0.1])
    for form in FORMS:
        total, metrics = policy_loss(logp, old, torch.tensor([-1.0, 1.0]), torch.tensor([0, 1]), 2, form=form)
        total.backward()
        assert total.dtype == torch.float32 and total.isfinite()
        assert logp.grad is not None and logp.grad.isfinite().all()
        assert all(math.isfinite(value) for value, _ in metrics.values())


def test_metrics_are_counts_over_tokens() -> None:
    logp, old, advantages, sequence = ragged(lengths=(40, 60))
    _, metrics = policy_loss(logp, old, advantages, sequence, 2, clip=CLIP, dual=1.4)
    ratio = (logp - old).exp()
    wanted = {
        "clip_low": ((ratio < 0.8) & (advantages < 0)).sum(),
        "clip_high": ((ratio > 1.28) & (advantages > 0)).sum(),
        "dual_clip": ((ratio > 1.4) & (advantages < 0)).sum(),
        "ratio": ratio.sum(),
        "ratio_far": ((ratio < 0.5) | (ratio > 2)).sum(),
        "approx_kl": (ratio - 1 - ratio.log()).sum(),
    }
    assert all(float(value) > 0 for value in wanted.values())
    for name, value in wanted.items():
        assert metrics[name] == (pytest.approx(float(value)), 100.0)
    assert metrics["ratio_peak"] == (pytest.approx(float(ratio.max())), 1.0)
    assert "clip_low" not in policy_loss(logp, old, advantages, sequence, 2, form="none")[1]


def test_kl_estimates_have_the_gradients_that_are_said_of_them() -> None:
    """By enumeration: k1's is 0, k2's that of KL(policy || reference), k3's that of KL(reference || policy)."""
    torch.manual_seed(3)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.exp()
    forward, backward = (p * (logp - reference)).sum(), (reference.exp() * (reference - logp)).sum()
    true = torch.autograd.grad(forward, logits, retain_graph=True)[0]
    other = torch.autograd.grad(backward, logits, retain_graph=True)[0]
    wanted = {"k1": torch.zeros(5, dtype=torch.float64), "k2": true, "k3": other, "k3+": true}
    for kind, gradient in wanted.items():
        estimate = kl_estimate(logp, reference, kind)
        found = torch.autograd.grad((p.detach() * estimate).sum(), logits, retain_graph=True)[0]
        assert (found - gradient).abs().max() < 1e-12, kind
    for kind in ("k1", "k3", "k3+"):
        assert abs((p * kl_estimate(logp, reference, kind)).sum() - forward) < 1e-12, kind


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_equals_its_formula_and_explains_variance(clip: float | None) -> None:
    values, old, returns, sequence = ragged()
    cost = []
    for v, before, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        bounded = v if clip is None else min(max(v, before - clip), before + clip)
        cost.append(0.5 * max((v - r) ** 2, (bounded - r) ** 2))
    total, _ = value_loss(values, old, returns, sequence, 4, clip=clip)
    assert abs(float(total) - sum(cost)) < 1e-12
    parts = [value_loss(values[i], old[i], returns[i], sequence[i], 4, clip=clip)[1] for i in (slice(5), slice(5, 12))]
    added = {name: tuple(map(sum, zip(*(p[name] for p in parts), strict=True))) for name in parts[0]}
    wanted = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert explained_variance(added) == pytest.approx(float(wanted), abs=1e-12)
    assert added["value_loss"] == (pytest.approx(sum(cost)), 12.0)


def test_value_clip_stops_the_gradient_only_where_it_would_help() -> None:
    values = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    old, returns = torch.tensor([0.0, 0.0, 0.9]), torch.tensor([2.0, -2.0, 2.0])
    value_loss(values, old, returns, torch.tensor([0, 0, 0]), 1, clip=0.2)[0].backward()
    # moved 1 towards the return: clipped; 1 away from it: pulled back; inside the clip: as ever
    assert values.grad is not None and values.grad.tolist() == [0.0, 3.0, -1.0]


def test_rollout_weights_bound_what_another_engine_may_have_got_wrong() -> None:
    trainer, engine, _, sequence = ragged()
    same, metrics = rollout_weights(trainer, trainer, sequence, 4)
    assert torch.equal(same, torch.ones_like(same))
    assert metrics["rollout/cut"] == (0.0, 12.0) and metrics["rollout/kl"][0] == 0.0
    own = (trainer - engine).exp()
    answer = sum_by_sequence(trainer - engine, sequence, 4).exp()[sequence]
    typical = mean_by_sequence(trainer - engine, sequence, 4).exp()[sequence]
    for level, test, weight in (("token", own, own), ("sequence", answer, answer), ("geometric", typical, own)):
        tis, _ = rollout_weights(trainer, engine, sequence, 4, mode="tis", cap=1.3, level=level)
        assert torch.equal(tis, test.clamp_max(1.3))
        kept = (test >= 0.8) & (test <= 1.3)
        masked, metrics = rollout_weights(trainer, engine, sequence, 4, mode="mask", low=0.8, cap=1.3, level=level)
        assert torch.equal(masked, weight * kept)
        assert metrics["rollout/cut"] == (float((~kept).sum()), 12.0)
    leaf = trainer.clone().requires_grad_()
    assert not rollout_weights(leaf, engine, sequence, 4)[0].requires_grad


def test_what_cannot_be_asked_for_is_refused_by_name() -> None:
    logp, old, advantages, sequence = ragged()
    for knobs, said in (
        ({"clip": (-0.1, 0.2)}, "clip"),
        ({"dual": 0.5}, "dual"),
        ({"level": "word"}, "level"),
        ({"form": "ppo"}, "form"),
        ({"aggregate": "mean"}, "aggregate"),
        ({"aggregate": "constant"}, "length"),
    ):
        with pytest.raises(HanlinError, match=said):
            policy_loss(logp, old, advantages, sequence, 4, **knobs)  # ty: ignore
    with pytest.raises(HanlinError, match="old values"):
        value_loss(logp, None, old, sequence, 4, clip=0.2)
    with pytest.raises(HanlinError, match="low"):
        rollout_weights(logp, old, sequence, 4, low=3.0)
    with pytest.raises(HanlinError, match="k3"):
        kl_estimate(logp, old, "k4")  # ty: ignore
