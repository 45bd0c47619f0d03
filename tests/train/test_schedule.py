"""The schedules' closed forms."""

import math

import pytest
from pydantic import ValidationError

from hanlin.train.schedule import lr_factor
from hanlin.train.settings import WSD, Constant, Cosine


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


@pytest.mark.parametrize("schedule", [Cosine(warmup=0), WSD(warmup=0, decay=1), Cosine(warmup=1), WSD(decay=0)])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_no_step_is_wasted_at_rate_zero_and_none_exceeds_the_peak(schedule, steps):
    if isinstance(schedule, Cosine):
        schedule = schedule.model_copy(update={"floor": 0.0})
    assert all(0 < lr_factor(schedule, s, steps) <= 1 for s in range(steps))


def test_warmup_and_decay_longer_than_the_run_are_refused():
    with pytest.raises(ValidationError, match="more than the whole run"):
        WSD(warmup=0.6, decay=0.5)
