"""The schedules' closed forms, and those of torch and transformers past the warm-up."""

import math

import pytest
import torch
import transformers
from pydantic import ValidationError

from hanlin.train.choices import WSD, Constant, Cosine, InverseSqrt, Linear, Restarts
from hanlin.train.schedule import lr_factor


def test_cosine_rises_straight_then_falls_by_half_a_cosine():
    schedule, steps = Cosine(warmup=0.1, floor=0.2), 100
    assert [lr_factor(schedule, s, steps) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert lr_factor(schedule, 10, steps) == 1.0
    assert lr_factor(schedule, 55, steps) == pytest.approx(0.6)  # half way: the mean of peak and floor
    for s in range(10, 100):
        expected = 0.2 + 0.8 * math.cos(math.pi * (s - 10) / 180) ** 2  # (1 + cos 2x) / 2 = cos^2 x
        assert lr_factor(schedule, s, steps) == pytest.approx(expected)


def test_wsd_is_flat_until_its_last_share_then_falls_straight():
    schedule, steps = WSD(warmup=0.05, decay=0.25, floor=0.1), 200
    assert [lr_factor(schedule, s, steps) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert {lr_factor(schedule, s, steps) for s in range(10, 151)} == {1.0}
    assert lr_factor(schedule, 175, steps) == pytest.approx(0.55)
    assert lr_factor(schedule, 199, steps) == pytest.approx(1 - 0.9 * 49 / 50)


def test_constant_stays_at_the_peak():
    assert [lr_factor(Constant(warmup=0.5), s, 4) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert lr_factor(Constant(), 0, 1) == 1.0


def test_linear_falls_straight_to_its_floor():
    schedule, steps = Linear(warmup=0.1, floor=0.2), 100
    assert [lr_factor(schedule, s, steps) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    for s in range(10, 100):
        assert lr_factor(schedule, s, steps) == pytest.approx(1 - 0.8 * (s - 10) / 90)


def test_inverse_square_root_halves_the_square_of_the_rate_in_one_timescale():
    schedule, steps = InverseSqrt(warmup=0.1), 1000
    assert lr_factor(schedule, 99, steps) == lr_factor(schedule, 100, steps) == 1.0
    assert lr_factor(schedule, 200, steps) == pytest.approx(math.sqrt(1 / 2))
    assert lr_factor(schedule, 400, steps) == pytest.approx(math.sqrt(1 / 4))
    endless = InverseSqrt(warmup=0, timescale=50)
    for s in range(300):  # no rate depends on the length
        assert lr_factor(endless, s, 300) == lr_factor(endless, s, 10_000) == pytest.approx(math.sqrt(50 / (s + 50)))


def test_restarts_grow_and_each_goes_from_the_peak_to_the_floor():
    """Three cycles of 100, 200 and 400 steps behind 50 of warm-up."""
    schedule, steps = Restarts(warmup=1 / 15, cycles=3, growth=2, floor=0.1), 750
    for begin, length in ((50, 100), (150, 200), (350, 400)):
        assert lr_factor(schedule, begin, steps) == 1.0
        for s in range(begin, begin + length):
            expected = 0.1 + 0.9 * math.cos(math.pi * (s - begin) / (2 * length)) ** 2
            assert lr_factor(schedule, s, steps) == pytest.approx(expected)


def test_one_cycle_is_the_cosine():
    for s in range(77):
        one = lr_factor(Restarts(warmup=0.1, cycles=1, floor=0.1), s, 77)
        assert one == pytest.approx(lr_factor(Cosine(warmup=0.1, floor=0.1), s, 77))


def theirs(make, steps):
    """The factors of a scheduler over an optimiser at rate 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


REFERENCES = {
    "linear": (Linear(warmup=0.1), lambda o: transformers.get_linear_schedule_with_warmup(o, 20, 200)),
    "cosine": (Cosine(warmup=0.1, floor=0), lambda o: transformers.get_cosine_schedule_with_warmup(o, 20, 200)),
    "cosine with a floor": (
        Cosine(warmup=0.1, floor=0.1),
        lambda o: transformers.get_scheduler(
            "cosine_with_min_lr", o, 20, 200, scheduler_specific_kwargs={"min_lr_rate": 0.1}
        ),
    ),
    "restarts": (
        Restarts(warmup=0.1, cycles=4),
        lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, 20, 200, num_cycles=4),
    ),
    "inverse_sqrt": (InverseSqrt(warmup=0.1), lambda o: transformers.get_inverse_sqrt_schedule(o, 20)),
    "inverse_sqrt with a timescale": (
        InverseSqrt(warmup=0.1, timescale=70),
        lambda o: transformers.get_inverse_sqrt_schedule(o, 20, timescale=70),
    ),
    "wsd": (
        WSD(warmup=0.1, decay=0.25),
        lambda o: transformers.get_wsd_schedule(o, 20, 50, num_training_steps=200, decay_type="linear"),
    ),
    "constant": (Constant(warmup=0.1), lambda o: transformers.get_constant_schedule_with_warmup(o, 20)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_past_the_warm_up_they_are_those_of_transformers(name):
    """200 steps, 20 of warm-up, to 1e-12. (theirs begins at rate 0 and wastes a step.)"""
    schedule, make = REFERENCES[name]
    found = [lr_factor(schedule, s, 200) for s in range(200)]
    assert found[20:] == pytest.approx(theirs(make, 200)[20:], abs=1e-12)


def test_growing_restarts_are_those_of_torch():
    """T_0 = 10, doubling: 10 + 20 + 40 + 80 steps, to 1e-12."""
    schedule = Restarts(warmup=0, cycles=4, growth=2, floor=0.01)
    expected = theirs(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=10, T_mult=2, eta_min=0.01), 150
    )
    assert [lr_factor(schedule, s, 150) for s in range(150)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        Cosine(warmup=0, floor=0), Cosine(warmup=1, floor=0), WSD(warmup=0, decay=1), WSD(decay=0), Linear(warmup=0),
        Linear(warmup=1), Restarts(warmup=0, cycles=7, growth=1.3), Restarts(warmup=1), InverseSqrt(warmup=0.5),
        InverseSqrt(warmup=0.001), InverseSqrt(warmup=0, timescale=3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_no_step_is_wasted_at_rate_zero_and_none_exceeds_the_peak(schedule, steps):
    assert all(0 < lr_factor(schedule, s, steps) <= 1 for s in range(steps))


def test_warmup_and_decay_longer_than_the_run_are_refused():
    with pytest.raises(ValidationError, match="more than the whole run"):
        WSD(warmup=0.6, decay=0.5)


def test_an_inverse_square_root_without_any_scale_is_refused():
    with pytest.raises(ValidationError, match="needs a timescale"):
        InverseSqrt(warmup=0)
