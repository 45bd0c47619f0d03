"""Learning-rate schedules as pure functions: (schedule, step, steps) -> factor of the peak rate.

`step` counts from 0 and is the optimizer step about to be made. Warm-up over w steps gives step s the factor
(s + 1) / w, so no step is made at rate zero; the decay reaches its floor at `steps`, one past the last step, so no step
is wasted there.

    constant      1
    linear        1 - (1 - floor) * t,  t = (s - w) / (steps - w)
    cosine        floor + (1 - floor) * (1 + cos(pi * t)) / 2
    restarts      the same in each of n cycles, with the cycle's own t; cycle i is growth^i times as long as the first
    WSD           1 until the last d steps, then 1 - (1 - floor) * t,  t = (s - (steps - d)) / d
    inverse_sqrt  sqrt(k / (s - w + k)),  k = timescale or w
"""

import math

from hanlin.train.choices import WSD, Constant, Cosine, InverseSqrt, Linear, Restarts, ScheduleChoice


def lr_factor(schedule: ScheduleChoice, step: int, steps: int) -> float:
    """The factor of optimizer step `step` (0-based) out of `steps`."""
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    place, length = step - warmup, steps - warmup
    match schedule:
        case Constant():
            return 1.0
        case Linear():
            return linear(place, length, schedule.floor)
        case Cosine():
            return cosine(place, length, schedule.floor)
        case Restarts():
            return restarts(place, length, schedule.floor, schedule.cycles, schedule.growth)
        case WSD():
            decay = min(round(schedule.decay * steps), length)
            return linear(step - (steps - decay), decay, schedule.floor)
        case InverseSqrt():
            return inverse_sqrt(place, schedule.timescale or max(1, warmup))


def cosine(place: float, length: float, floor: float) -> float:
    """Half a cosine from 1 at place 0 to `floor` at place `length`."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, place / length))) / 2


def linear(place: int, length: int, floor: float) -> float:
    """1 up to place 0, then straight down to `floor` at place `length`."""
    return 1.0 if place <= 0 else 1 - (1 - floor) * min(1.0, place / length)


def restarts(place: int, length: int, floor: float, cycles: int, growth: float) -> float:
    """`cycles` half cosines that fill `length`, each `growth` times as long as the one before; floor from there on."""
    if place >= length:
        return floor
    sizes = [growth**i for i in range(cycles)]
    begin, unit = 0.0, length / sum(sizes)
    for size in sizes[:-1]:
        end = begin + size * unit
        if place < end - 1e-9 * length:  # a boundary on a whole step, as it was meant
            return cosine(place - begin, size * unit, floor)
        begin = end
    return cosine(max(0.0, place - begin), length - begin, floor)


def inverse_sqrt(place: int, timescale: int) -> float:
    """1 at place 0, 1 / sqrt(2) at place `timescale`."""
    return math.sqrt(timescale / (max(0, place) + timescale))
