"""The reward-hacking alarm on curves whose truth is known: it speaks when it should, and not of noise."""

import itertools
import math
import random

import pytest

from hanlin.align.hacking import CHANCE, hacking_alarm, trend_chance
from hanlin.core.errors import HanlinError


def curves(seed: int, truth) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """A reward that rises in noise every step, and what it stands for every fifth."""
    chance = random.Random(seed)
    proxy = [(step, 0.01 * step + chance.gauss(0, 0.3)) for step in range(300)]
    return proxy, [(step, truth(step) + chance.gauss(0, 0.03)) for step in range(0, 300, 5)]


def first_alarm(proxy, truth) -> tuple[float, str] | None:
    """As a monitor asks: after every measurement of the truth, with what is known then."""
    for count in range(1, len(truth) + 1):
        now = truth[count - 1][0]
        if said := hacking_alarm([point for point in proxy if point[0] <= now], truth[:count]):
            return now, said
    return None


def test_it_speaks_soon_after_the_truth_begins_to_fall():
    alarms = [first_alarm(*curves(seed, lambda s: 0.6 - 0.0015 * max(0, s - 150))) for seed in range(20)]
    assert all(alarms)
    steps = [alarm[0] for alarm in alarms if alarm]
    assert all(150 < step < 290 for step in steps) and sum(steps) / len(steps) < 250
    assert "held-out accuracy fell from 0.6" in alarms[0][1] and "the reward rose" in alarms[0][1]


@pytest.mark.parametrize(
    "truth", [lambda s: 0.6, lambda s: 0.3 + 0.001 * s, lambda s: 0.6 - 0.00003 * s], ids=["flat", "rising", "a little"]
)
def test_it_is_silent_where_the_truth_does_not_fall(truth):
    """1,000 looks at noise: not one alarm."""
    assert not [seed for seed in range(17) if first_alarm(*curves(seed, truth))]


def test_it_is_silent_where_the_reward_does_not_rise():
    proxy, truth = curves(0, lambda s: 0.6 - 0.001 * s)
    assert first_alarm(proxy, truth)
    assert first_alarm([(step, -value) for step, value in proxy], truth) is None
    flat = random.Random(3)
    assert first_alarm([(step, flat.gauss(0, 1)) for step, _ in proxy], truth) is None


def test_outliers_missing_values_and_few_points_do_not_mislead_it():
    proxy = [(float(s), float(s)) for s in range(10)]
    falling = [(float(s), 1 - 0.1 * s) for s in range(10)]
    assert hacking_alarm(proxy, falling)
    assert hacking_alarm(proxy[:5], falling[:5]) is None
    spoilt = [*falling[:4], (4.0, math.nan), *falling[5:]]
    assert hacking_alarm(proxy, spoilt)
    assert hacking_alarm(proxy, [*[(float(s), 1.0) for s in range(9)], (9.0, -50.0)]) is None
    with pytest.raises(HanlinError, match="do not ascend"):
        hacking_alarm([(1.0, 0.0), (1.0, 1.0)], falling)


def test_the_chance_of_a_trend_equals_enumeration():
    values = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    orders = [trend_chance(order) for order in itertools.permutations(values)]
    rising = trend_chance(values)
    assert rising == pytest.approx(1 / math.factorial(6))
    for level in (0.01, 0.1, 0.5):  # of all orders, exactly a share of at most `level` looks as rare as that
        share = sum(chance <= level for chance in orders) / len(orders)
        assert share <= level
        assert share == pytest.approx(max(chance for chance in orders if chance <= level))
    chance = random.Random(1)
    for trend in (0.0, 0.02, 0.05):
        long = [trend * step + chance.gauss(0, 1) for step in range(60)]
        assert trend_chance(long, exact=59) == pytest.approx(trend_chance(long), rel=0.1, abs=1e-6)
    assert 0 < CHANCE < 1e-3
