"""Spikes are found by a robust limit, their rows are left out, and the rest of the run is as if they had never been."""

import json
import math
import random
from copy import deepcopy
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.train.spikes import Skips, SpikeDetector, SpikeGuard


@given(st.sets(st.integers(0, 60), max_size=20))
def test_optimizer_steps_read_the_data_steps_that_are_not_left_out_in_order(left_out):
    skips = Skips().add(*left_out)
    assert [skips.data_step(step) for step in range(40)] == [n for n in range(100) if n not in left_out][:40]


def test_of_normal_noise_one_spike_in_millions_is_claimed_and_a_jump_is_seen():
    """The limit stands near median + k sigma: within 25 % of k, over a window of 64."""
    chance = random.Random(0)
    detector = SpikeDetector(window=64, threshold=6.0)
    for _ in range(64):
        detector.accept(chance.gauss(3.0, 0.1), math.exp(chance.gauss(0.0, 0.1)))
    assert NormalDist(3.0, 0.1).zscore(detector.limit(detector.losses, 0.0)) == pytest.approx(6.0, rel=0.25)
    assert all(detector.verdict(chance.gauss(3.0, 0.1), 1.0) == "ok" for _ in range(10_000))
    assert detector.verdict(4.0, 1.0) == "spike"
    assert detector.verdict(3.0, 5.0) == "spike"
    assert detector.verdict(1.0, 0.01) == "ok"  # downwards nothing is one


def test_spikes_in_the_window_do_not_hide_the_next():
    """A quarter of the window may be outliers; with mean and standard deviation the limit would be above them."""
    values = [3.0 + 0.01 * (n % 5) for n in range(48)] + [30.0] * 16
    detector = SpikeDetector(window=64, threshold=8.0)
    for value in values:
        detector.accept(value, 1.0)
    assert detector.verdict(6.0, 1.0) == "spike"
    mean = sum(values) / 64
    assert mean + 8 * (sum((v - mean) ** 2 for v in values) / 64) ** 0.5 > 30


def test_nothing_is_said_before_enough_steps_are_known_but_what_is_not_finite():
    detector = SpikeDetector(window=32)
    for _ in range(15):
        detector.accept(1.0, 1.0)
        assert detector.verdict(100.0, 1.0) == "ok"
    assert detector.verdict(math.nan, 1.0) == detector.verdict(1.0, math.inf) == "spike"
    detector.accept(1.0, 1.0)
    assert detector.verdict(1.07, 1.0) == "ok" and detector.verdict(1.09, 1.0) == "spike"  # 8 x 1 % of the median


def test_the_state_goes_through_json_and_gives_the_same_verdicts():
    guard = SpikeGuard(SpikeDetector(window=16), "skip")
    for step in range(12):
        guard.judge(step, 2.0 + 0.1 * (step % 3), 1.0)
    guard.judge(12, 9.0, 1.0)
    other = SpikeGuard(SpikeDetector(window=16), "skip")
    other.load(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state() and other.data_step(12) == 13
    assert [other.judge(12, loss, 1.0) for loss in (2.1, 9.0)] == [guard.judge(12, loss, 1.0) for loss in (2.1, 9.0)]


def test_after_too_many_spikes_the_run_stops_with_what_was_left_out():
    guard = SpikeGuard(SpikeDetector(window=8), "skip", most=2)
    for step in range(8):
        guard.judge(step, 1.0, 1.0)
    assert [guard.judge(8, 9.0, 1.0) for _ in range(2)] == ["skip", "skip"]
    with pytest.raises(HanlinError, match=r"Step 9: the loss 9 .* number 3 .* left out: 8, 9\."):
        guard.judge(8, 9.0, 1.0)


def test_impossible_windows_are_refused():
    with pytest.raises(HanlinError, match="threshold -1"):
        SpikeDetector(threshold=-1)
    with pytest.raises(HanlinError, match="window 4"):
        SpikeDetector(window=4)


def test_without_a_checkpoint_a_rollback_leaves_the_step_out_only():
    guard = SpikeGuard(SpikeDetector(window=8), "rollback")
    for step in range(8):
        guard.judge(step, 1.0, 1.0)
    assert guard.judge(8, 9.0, 1.0, oldest=None) == "skip" and guard.skips == Skips((8,))
    assert guard.judge(8, 9.0, 1.0, oldest=4) == "rollback" and guard.skips == Skips((7, 8, 9))
    assert guard.judge(4, 9.0, 1.0, oldest=4) == "rollback" and guard.skips == Skips((4, 7, 8, 9))


# --- a real descent over rows by step ---

STEPS, BAD = 60, 41


def rows_of(step: int, *, poisoned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, dtype=torch.float64, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    y = y + 0.3 * torch.randn(16, dtype=torch.float64, generator=generator)
    return x, y + 200 if poisoned and step == BAD else y


def descend(guard: SpikeGuard, *, poisoned: bool, save_every: int = 10) -> tuple[torch.Tensor, list[int]]:
    """The weights after `STEPS` steps, and the data steps that they were made with."""
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=0.05)
    step, read, saved = 0, [], None
    while step < STEPS:
        number = guard.data_step(step)
        x, y = rows_of(number, poisoned=poisoned)
        loss = (x @ weights - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        done = None if saved is None else saved["step"]
        action = guard.judge(step, float(loss.detach()), float(weights.grad.norm()), oldest=done)
        if action == "skip":
            continue
        if action == "rollback":
            weights.data.copy_(saved["weights"])
            optimizer.load_state_dict(deepcopy(saved["optimizer"]))
            guard.load(saved["guard"])
            step, read = saved["step"], saved["read"][:]
            continue
        optimizer.step()
        read.append(number)
        step += 1
        if step % save_every == 0:
            saved = deepcopy({
                "step": step, "weights": weights.detach(), "optimizer": optimizer.state_dict(),
                "guard": guard.state(), "read": read,
            })  # fmt: skip
    return weights.detach(), read


def test_a_planted_spike_is_skipped_and_the_run_is_that_without_its_rows():
    found, read = descend(SpikeGuard(SpikeDetector(window=20), "skip"), poisoned=True)
    assert read == [n for n in range(STEPS + 1) if n != BAD]
    wanted = SpikeGuard(SpikeDetector(window=20), "skip")
    wanted.skips = Skips((BAD,))
    assert torch.equal(found, descend(wanted, poisoned=False)[0])


def test_a_planted_spike_is_rolled_back_and_the_steps_before_it_are_left_out():
    found, read = descend(SpikeGuard(SpikeDetector(window=20), "rollback"), poisoned=True)
    assert read == [n for n in range(STEPS + 2) if n not in (BAD - 1, BAD)]
    wanted = SpikeGuard(SpikeDetector(window=20), "rollback")
    wanted.skips = Skips((BAD - 1, BAD))
    assert torch.equal(found, descend(wanted, poisoned=False)[0])


def test_without_the_guard_the_planted_rows_do_harm():
    blind = SpikeGuard(SpikeDetector(window=20, threshold=1e9), "skip")
    truth = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    harmed, _ = descend(blind, poisoned=True)
    kept, _ = descend(SpikeGuard(SpikeDetector(window=20), "skip"), poisoned=True)
    assert (harmed - truth).norm() > 1.05 * (kept - truth).norm()
