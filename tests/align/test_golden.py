"""Every loss and advantage beside what trl, verl, OpenRLHF and torchtune make of the same numbers, 1e-6 apart at most.

`tests/golden/make.py` wrote `golden.json` from the libraries themselves. A case has one name in all libraries that know
it; where conventions differ (eps, biased variance, averaged IPO) the cases do, and ours is called with that convention.
"""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hanlin.align.policy_loss import kl_estimate, policy_loss, rollout_weights, value_loss
from hanlin.align.preference_loss import kto_anchor, kto_loss, preference_loss
from hanlin.align.reward_loss import pairwise_loss, process_loss
from hanlin.align.sequence_sums import aggregate
from hanlin.rl.advantages import gae, group_advantages, moments, reward_to_go, terminal_rewards, whiten

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "golden.json").read_text(encoding="utf-8"))
LOW, HIGH = GOLDEN["clip"]
TOLERANCE = 1e-6


GIVEN = {
    name: torch.tensor(x, dtype=torch.float64) if isinstance(torch.tensor(x).sum().item(), float) else torch.tensor(x)
    for name, x in GOLDEN["inputs"].items()
}
RIGHT, HOLES = GIVEN["mask"], GIVEN["holes"]  # padding at the end; observations and padding anywhere
FULL = torch.ones_like(RIGHT)
ROWS, WIDTH = RIGHT.shape
Case = tuple[str | None, Callable[[Tensor | None], Tensor], Tensor | None]  # gradient to, what, compared where


def flat(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Kept tokens and their sequences."""
    return x[mask], mask.nonzero()[:, 0], ROWS


def mean_of(total: Tensor, mask: Tensor, how: str = "token") -> Tensor:
    return total / (mask.sum() if how == "token" else ROWS)


def policy(mask: Tensor = HOLES, beta: float = 0.0, correction: dict | None = None, **knobs) -> Case:
    how = knobs.get("aggregate", "token")
    knobs = {"clip": (LOW, HIGH), **knobs}
    old = GIVEN["old"][mask]

    def run(x: Tensor) -> Tensor:
        logp, sequence, count = flat(x, mask)
        if correction is not None:
            knobs["weight"] = rollout_weights(old, GIVEN["rollout"][mask], sequence, count, **correction)[0]
        total, _ = policy_loss(logp, old, GIVEN["scores"][sequence], sequence, count, **knobs)
        if beta:
            total = total + beta * aggregate(kl_estimate(logp, GIVEN["ref"][mask], "k3"), sequence, count, how)
        return mean_of(total, mask, how)

    return "logp", run, None


def value(clip: float | None, mask: Tensor = HOLES) -> Case:
    def run(x: Tensor) -> Tensor:
        values, sequence, count = flat(x, mask)
        old, returns = GIVEN["old_values"][mask], GIVEN["returns"][mask]
        return mean_of(value_loss(values, old, returns, sequence, count, clip=clip)[0], mask)

    return "values", run, None


def preference(kind: str, **knobs) -> Case:
    means = kind in ("simpo", "orpo")
    per_token = knobs.pop("per_token", False)
    knobs = {"beta": 0.3, **knobs}

    def run(x: Tensor) -> Tensor:
        if means:
            total, metrics = preference_loss(x, GIVEN["rejected_mean"], kind=kind, **knobs)
        else:
            lengths = [GIVEN[f"{side}_tokens"] if per_token else 1 for side in ("chosen", "rejected")]
            said = [x / lengths[0], GIVEN["rejected"] / lengths[1]]
            said += [GIVEN["ref_chosen"] / lengths[0], GIVEN["ref_rejected"] / lengths[1]]
            total, metrics = preference_loss(*said, kind=kind, **knobs)
        assert metrics["rewards/accuracy"][1] == len(x)
        return total / len(x)

    return "chosen_mean" if means else "chosen", run, None


def kto(good_weight: float, bad_weight: float) -> Case:
    def run(x: Tensor) -> Tensor:
        total, count = kto_anchor(GIVEN["kl_change"])
        change = x - GIVEN["ref_chosen"]
        weights = {"good_weight": good_weight, "bad_weight": bad_weight}
        return kto_loss(change, GIVEN["good"], total / count, beta=0.3, **weights)[0] / len(x)

    return "chosen", run, None


def reward(**knobs) -> Case:
    return "chosen", lambda x: pairwise_loss(x, GIVEN["rejected"], **knobs)[0] / len(x), None


def steps() -> Case:
    return "step_logits", lambda x: process_loss(x, GIVEN["step_labels"])[0] / len(x), None


def kl(kind: str) -> Case:
    return "logp", lambda x: kl_estimate(x[HOLES], GIVEN["ref"][HOLES], kind).sum(), None


def plain(run: Callable[[], Tensor], where: Tensor | None = None) -> Case:
    return None, lambda _: run(), where


def estimated(mask: Tensor, part: int) -> Tensor:
    return gae(GIVEN["rewards"], GIVEN["values"], mask, gamma=0.97, lam=0.9)[part]


def spread(x: Tensor, mask: Tensor) -> Tensor:
    return x[:, None] * mask


def group(**knobs) -> Tensor:
    return group_advantages(GIVEN["scores"], GIVEN["group"], **knobs)


def biased(x: Tensor) -> Tensor:
    return whiten(x, keep=RIGHT, biased=True, moments=moments(x, keep=RIGHT))


def weights(level: str, mode: str, low: float, cap: float) -> Case:
    def run() -> Tensor:
        old, sequence, count = flat(GIVEN["old"], HOLES)
        found, _ = rollout_weights(
            old, GIVEN["rollout"][HOLES], sequence, count, level=level, mode=mode, low=low, cap=cap
        )
        return torch.zeros(ROWS, WIDTH, dtype=found.dtype).masked_scatter(HOLES, found)

    return plain(run)


def constant() -> Tensor:
    return aggregate(*flat(GIVEN["rewards"], HOLES), "constant", 16) / ROWS


def with_scores(mask: Tensor) -> Tensor:
    return terminal_rewards(GIVEN["scores"], mask)


GSPO = {"level": "sequence"}
ANSWER = {"aggregate": "sequence"}
OURS: dict[str, Case] = {
    "policy/token": policy(),
    "policy/sequence": policy(**ANSWER),
    "policy/constant": policy(aggregate="constant", length=16),
    "policy/dual": policy(dual=3.0),
    "policy/gspo": policy(**GSPO, **ANSWER),
    "policy/gspo_token": policy(**GSPO),
    "policy/rloo": policy(level="sequence_sum", **ANSWER),
    "policy/cispo": policy(form="cispo"),
    "policy/cispo_open": policy(form="cispo", clip=(1.0, 0.4)),
    "policy/dppo": policy(form="dppo", clip=(0.05, 0.1), dual=3.0),
    "policy/weighted": policy(weight=GIVEN["rollout"][HOLES].exp()),
    "policy/tis": policy(correction={"mode": "tis", "low": 0.5, "cap": 1.3}),
    "policy/mask": policy(correction={"mode": "mask", "low": 0.7, "cap": 1.3}),
    "policy/geometric": policy(correction={"mode": "mask", "level": "geometric", "low": 0.8, "cap": 1.2}),
    "policy/sequence_k3": policy(beta=0.04, **ANSWER),
    "policy/symmetric": policy(clip=(LOW, LOW)),
    "ppo/policy": policy(RIGHT, clip=(LOW, LOW)),
    "ppo/value": value(0.2, RIGHT),
    "ppo/returns": plain(lambda: estimated(RIGHT, 1)),
    "ppo/advantages": plain(lambda: whiten(estimated(RIGHT, 0), keep=RIGHT)),
    "whiten/keep_mean": plain(lambda: whiten(GIVEN["rewards"], keep=RIGHT, shift=False)),
    "value/clip": value(0.2),
    "value/none": value(None),
    "aggregate/constant": plain(constant),
    "kl/k1": kl("k1"),
    "kl/k2": kl("k2"),
    "kl/k3": kl("k3"),
    "kl/k3+": kl("k3+"),
    "rollout/token/tis": weights("token", "tis", 0.0, 1.3),
    "rollout/sequence/tis": weights("sequence", "tis", 0.0, 1.5),
    "rollout/token/mask": weights("token", "mask", 0.7, 1.3),
    "rollout/sequence/mask": weights("sequence", "mask", 0.5, 1.5),
    "gae/holes": plain(lambda: estimated(HOLES, 1), HOLES),
    "gae/full": plain(lambda: estimated(FULL, 1)),
    "gae/right": plain(lambda: estimated(RIGHT, 0)),
    "gae/whitened": plain(lambda: whiten(estimated(HOLES, 0), keep=HOLES), HOLES),
    "to_go/right": plain(lambda: reward_to_go(GIVEN["rewards"], RIGHT, gamma=0.97)),
    "terminal": plain(lambda: terminal_rewards(GIVEN["scores"], RIGHT, GIVEN["rewards"], 0.1)),
    "remax": plain(lambda: (reward_to_go(GIVEN["rewards"], HOLES) - GIVEN["greedy"][:, None]) * HOLES, HOLES),
    "reinforce_pp": plain(lambda: whiten(reward_to_go(GIVEN["rewards"], HOLES, gamma=0.97), keep=HOLES)),
    "reinforce_pp/returns": plain(lambda: reward_to_go(GIVEN["rewards"], HOLES, gamma=0.97)),
    "reinforce_pp_baseline": plain(lambda: whiten(spread(group(scale="none"), HOLES), keep=HOLES)),
    "group/std": plain(lambda: group(eps=1e-6)),
    "group/std_1e-4": plain(lambda: group(eps=1e-4)),
    "group/none": plain(lambda: group(scale="none")),
    "group/leave_one_out": plain(lambda: group(baseline="leave_one_out", scale="none")),
    "advantages/group_norm": plain(lambda: spread(group(eps=1e-9), FULL), RIGHT),
    "advantages/rloo": plain(lambda: spread(group(baseline="leave_one_out", scale="none"), FULL), RIGHT),
    "advantages/dr_grpo": plain(lambda: spread(group(scale="none"), FULL), RIGHT),
    "advantages/reinforce_baseline": plain(lambda: biased(spread(group(scale="none"), FULL)), RIGHT),
    "advantages/reinforce": plain(lambda: biased(reward_to_go(with_scores(RIGHT), RIGHT)), RIGHT),
    "advantages/gae": plain(lambda: biased(gae(with_scores(RIGHT), GIVEN["values"], RIGHT, lam=0.9)[0]), RIGHT),
    "reward/pairwise": reward(margin=GIVEN["margin"]),
    "reward/logexp": reward(),
    "reward/centred": reward(centre=0.01),
    "reward/process": steps(),
    "preference/dpo": preference("dpo"),
    "preference/cdpo": preference("cdpo", smoothing=0.2),
    "preference/robust": preference("robust", smoothing=0.2),
    "preference/hinge": preference("hinge"),
    "preference/ipo_sum": preference("ipo"),
    "preference/ipo_mean": preference("ipo", per_token=True),
    "preference/simpo": preference("simpo", beta=2.0, gamma=1.0),
    "preference/orpo": preference("orpo"),
    "preference/kto": kto(1.0, 1.0),
    "preference/kto_weighted": kto(1.3, 0.7),
}


def apart(name: str, found: dict, run: Callable[[Tensor], Tensor] | None = None) -> float:
    """How far the case is from what a library found: the largest difference of a value or of a gradient."""
    leaf, own, where = OURS[name]
    x = None if leaf is None else GIVEN[leaf].clone().requires_grad_()
    value = (run or own)(x)
    gaps = []
    if "value" in found:
        wanted = torch.tensor(found["value"], dtype=torch.float64)
        assert value.shape == wanted.shape
        gaps.append((value.detach() - wanted).abs()[... if where is None else where].max())
    if "gradient" in found:
        assert x is not None
        value.backward()
        assert x.grad is not None
        gaps.append((x.grad - torch.tensor(found["gradient"], dtype=torch.float64)).abs().max())
    return float(torch.stack(gaps).max())


CASES = [(library, name) for library, cases in GOLDEN["found"].items() for name in cases]


@pytest.mark.parametrize(("library", "name"), CASES, ids=lambda x: x)
def test_equals_the_library(library: str, name: str) -> None:
    assert apart(name, GOLDEN["found"][library][name]) < TOLERANCE


def test_single_precision_stays_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training computes these in fp32."""
    for name, x in GIVEN.items():
        monkeypatch.setitem(GIVEN, name, x.float() if x.is_floating_point() else x)
    assert max(apart(name, GOLDEN["found"][library][name]) for library, name in CASES) < 2 * TOLERANCE


def test_every_case_of_ours_has_a_library() -> None:
    assert set(OURS) == {name for _, name in CASES}


def test_the_batch_tells_the_variants_apart() -> None:
    """Else a parity could hold by chance: no two variants of the policy loss have the same gradient on this batch."""
    found = {
        name: torch.tensor(case["gradient"])
        for cases in GOLDEN["found"].values()
        for name, case in cases.items()
        if name.startswith("policy/")
    }
    for (name, mine), (other, theirs) in combinations(found.items(), 2):
        assert (mine - theirs).abs().max() > 1e-4, (name, other)
